"""compare_logprobs: an engine's log-probabilities of the tokens that it drew, beside what others say of these tokens.

Owns the comparison, token by token. Two others are asked: the forward pass of a transformers model, as a trainer runs
it, and the engine itself, which scores the tokens as a prompt; with `deterministic=True` that is equal to the bit.
Invariant: all speak of the same tokens behind the same tokens, and of the raw distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams


@dataclass(frozen=True)
class Mismatch:
    """Of each drawn token, by prompt: what the engine said of it, and the others' difference from that.

    trainer, rescored: the trainer's log-probability less the engine's, and the engine's own when it scores the tokens.
    """

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    trainer: list[list[float]]
    rescored: list[list[float]]


def mean_and_worst(differences: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Of the absolute values, over all tokens."""
    sizes = [abs(one) for row in differences for one in row]
    return sum(sizes) / len(sizes), max(sizes)


def compare_logprobs(llm: LLM, model: Any, prompts: Sequence[Any], params: SamplingParams | None = None) -> Mismatch:
    """Complete each prompt, and ask a transformers model, in evaluation mode, and the engine about what came.

    params: how to draw; by default 32 tokens with temperature 1. Raises ValueError for an engine with another
    logprobs_mode than "raw_logprobs".
    """
    if llm.config.logprobs_mode != "raw_logprobs":
        raise ValueError(
            f"log-probabilities are compared as raw_logprobs, and the engine has {llm.config.logprobs_mode}"
        )
    drawing = params.clone() if params is not None else SamplingParams(max_tokens=32)
    drawing.logprobs, drawing.n = 0, 1
    outputs = llm.generate(list(prompts), drawing, use_tqdm=False)
    token_ids = [list(output.outputs[0].token_ids) for output in outputs]
    prompt_ids = [list(output.prompt_token_ids) for output in outputs]
    own = [own_logprobs(ids, output.outputs[0].logprobs) for output, ids in zip(outputs, token_ids, strict=True)]
    scoring = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    scored = llm.generate([a + b for a, b in zip(prompt_ids, token_ids, strict=True)], scoring, use_tqdm=False)
    again = [
        own_logprobs(ids, (output.prompt_logprobs or [])[-len(ids) :])
        for output, ids in zip(scored, token_ids, strict=True)
    ]
    theirs = [_of_model(model, first, ids) for first, ids in zip(prompt_ids, token_ids, strict=True)]
    return Mismatch(token_ids, own, _less(theirs, own), _less(again, own))


def own_logprobs(token_ids: Sequence[int], entries: Any) -> list[float]:
    """Of each token, its own log-probability among those that came with it."""
    return [entry[token_id].logprob for token_id, entry in zip(token_ids, entries or (), strict=True)]


@torch.no_grad()
def _of_model(model: Any, prompt_ids: list[int], token_ids: list[int]) -> list[float]:
    """As trainers compute them: logits of one forward pass, log-softmax in float32."""
    ids = torch.tensor([prompt_ids + token_ids], device=model.device)
    logits = model(ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1].float()
    values: list[float] = logits.log_softmax(-1).gather(1, ids[0, len(prompt_ids) :, None])[:, 0].tolist()
    return values


def _less(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[a - b for a, b in zip(one, two, strict=True)] for one, two in zip(left, right, strict=True)]
