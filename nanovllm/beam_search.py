"""Beam search on top of the engine's public interface: keep the most likely beginnings, extend each by one token.

Owns the bookkeeping of beams; every step is one `generate` of one token for each beam of all prompts, and the prefix
cache keeps what was computed. Invariant: of a prompt's beams and their likeliest continuations, none that was dropped
is more likely than one that was kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from nanovllm.engine.input_processor import InputProcessor, Prompt
from nanovllm.engine.logprobs import LogprobsMap
from nanovllm.options import check_fields, option, takes_options
from nanovllm.outputs import BeamSearchOutput, BeamSearchSequence, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.tokenizer import Tokenizer

Array = npt.NDArray[Any]
Generate = Callable[[list[list[int]], SamplingParams], list[RequestOutput]]


@takes_options
@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Parameters of `LLM.beam_search`. Raises TypeError for a wrong type or name and ValueError out of range.

    beam_width: sequences that are kept at a time, and returned; at most 1,024.
    max_tokens: at most this many output tokens.
    ignore_eos: go on past the model's end-of-sequence tokens.
    temperature: logits are divided by it; 0 and 1 leave them as they are.
    length_penalty: sequences are compared by their log-probability divided by this power of their length, prompt
        included; above 0 it favours long ones. In [-50, 50].
    """

    beam_width: int = option(low=1, high=1_024)  # a step weighs twice its square
    max_tokens: int = option(low=1)
    ignore_eos: bool = False
    temperature: float = option(0.0, low=0, words="0 or more")
    length_penalty: float = option(1.0, low=-50, high=50)  # beyond, no float holds the power of a long sequence

    def __post_init__(self) -> None:
        check_fields(self)


def search_prompts(
    generate: Generate,
    input_processor: InputProcessor,
    tokenizer: Tokenizer | None,
    max_model_len: int,
    prompts: Sequence[Prompt],
    params: BeamSearchParams,
    use_tqdm: bool,
) -> list[BeamSearchOutput]:
    """See `LLM.beam_search`."""
    if not isinstance(params, BeamSearchParams):
        raise TypeError(f"params must be BeamSearchParams, got {params!r}")
    longest = max_model_len - params.max_tokens
    token_ids = [input_processor.read_prompt(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    for i, ids in enumerate(token_ids):
        if len(ids) > longest:
            raise ValueError(
                f"prompts[{i}] has {len(ids)} tokens; with max_tokens={params.max_tokens} and max_model_len="
                f"{max_model_len} there is room for {max(longest, 0)}"
            )
    with tqdm(total=params.max_tokens, desc="Beam search", unit=" tokens", disable=not use_tqdm) as progress:

        def generate_and_count(beams: list[list[int]], step: SamplingParams) -> list[RequestOutput]:
            progress.update()
            return generate(beams, step)

        outputs = beam_search(generate_and_count, token_ids, params, frozenset(input_processor.eos_token_ids))
    for sequence in (sequence for output in outputs for sequence in output.sequences):
        if tokenizer is not None:
            sequence.text = tokenizer.decode(sequence.tokens[sequence.num_prompt_tokens :])
    return outputs


def beam_search(
    generate: Generate, prompts: Sequence[list[int]], params: BeamSearchParams, eos_token_ids: frozenset[int]
) -> list[BeamSearchOutput]:
    """For each prompt (token ids) the best `beam_width` sequences, best first.

    As vLLM's: a sequence ends with EOS or after max_tokens; beams are compared by `score`, and of the beams that have
    ended and those that are cut at max_tokens the best are returned.
    """
    # Twice as many continuations as beams: even if one of each beam's is EOS, beam_width others are left.
    has_temperature = params.temperature not in (0, 1)
    step = SamplingParams(
        temperature=0,
        max_tokens=1,
        logprobs=-1 if has_temperature else 2 * params.beam_width,
        detokenize=False,
        ignore_eos=True,
    )
    end_ids = [] if params.ignore_eos else sorted(eos_token_ids)
    beams = [[BeamSearchSequence(tokens=list(prompt), num_prompt_tokens=len(prompt))] for prompt in prompts]
    ended: list[list[BeamSearchSequence]] = [[] for _ in prompts]

    def score(sequence: BeamSearchSequence) -> float:
        """Per token of prompt and output where length_penalty is 1; an EOS that ends it does not count."""
        length = len(sequence.tokens) - (sequence.finish_reason == "stop")
        return sequence.cum_logprob / length**params.length_penalty

    for _ in range(params.max_tokens):
        running = [(which, beam) for which, kept in enumerate(beams) for beam in kept]
        if not running:
            break
        results = iter(generate([beam.tokens for _, beam in running], step))
        for which, kept in enumerate(beams):
            found = [_likeliest(next(results), 2 * params.beam_width, params.temperature) for _ in kept]
            beams[which] = []
            for beam, token_id, logprob, is_end in _best_first(kept, found, end_ids, params.beam_width):
                extended = BeamSearchSequence(
                    tokens=[*beam.tokens, token_id],
                    num_prompt_tokens=beam.num_prompt_tokens,
                    cum_logprob=beam.cum_logprob + logprob,
                    finish_reason="stop" if is_end else None,
                )
                (ended if is_end else beams)[which].append(extended)
            ended[which] = sorted(ended[which], key=score, reverse=True)[: params.beam_width]
    for kept in beams:
        for beam in kept:
            beam.finish_reason = "length"
    return [
        BeamSearchOutput(sequences=sorted(done + kept, key=score, reverse=True)[: params.beam_width])
        for done, kept in zip(ended, beams, strict=True)
    ]


def _likeliest(output: RequestOutput, count: int, temperature: float) -> tuple[Array, Array]:
    """Ids and log-probabilities of the likeliest next tokens, lowest id first among equals.

    A temperature needs the whole vocabulary's.
    """
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None and isinstance(logprobs[0], LogprobsMap), "asked for, and the engine's hold arrays"
    entries = logprobs[0].entries
    token_ids, values = entries["token_id"], entries["logprob"].astype(np.float64)
    if temperature not in (0, 1):
        values /= temperature
        values -= np.logaddexp.reduce(values)
    best = np.lexsort((token_ids, -values))[:count]
    return token_ids[best], values[best]


def _best_first(
    kept: Sequence[BeamSearchSequence], found: Sequence[tuple[Array, Array]], end_ids: Sequence[int], beam_width: int
) -> Iterator[tuple[BeamSearchSequence, int, float, bool]]:
    """Beams with a token that follows and whether that ends them: all that end, and the best `beam_width` others.

    Most likely sequence first, the earlier beam's among equals. All are of one length, so that their order is that of
    their sums.
    """
    if not kept:
        return
    token_ids = np.concatenate([ids for ids, _ in found])
    values = np.concatenate([values for _, values in found])
    of_beam = np.repeat(np.arange(len(kept)), [len(ids) for ids, _ in found])
    totals = np.array([beam.cum_logprob for beam in kept])[of_beam] + values
    order = np.argsort(-totals, kind="stable")
    is_end = np.isin(token_ids, end_ids)[order]
    is_taken = is_end | (np.cumsum(~is_end) <= beam_width)
    for index, ends in zip(order[is_taken].tolist(), is_end[is_taken].tolist(), strict=True):
        yield kept[of_beam[index]], int(token_ids[index]), float(values[index]), ends
