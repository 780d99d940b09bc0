"""Two checkpoints of one shape: an engine that starts with the first and gets the second's tensors is as one that
started with the second.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nanovllm import LLM, SamplingParams
from tests.tiny_models import random_prompts, save_random

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "block_size": 8, "skip_tokenizer_init": True}
PROMPTS = random_prompts([1, 9, 30, 17])
GREEDY = SamplingParams(temperature=0, max_tokens=8, logprobs=2)


def save_two(folder: Path, architecture: str = "LlamaForCausalLM", **config: Any) -> list[Path]:
    return [save_random(folder / str(seed), architecture, seed=seed, **config) for seed in range(2)]


def make_llm(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), **{**OPTIONS, **options})


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@dataclass
class Generated:
    """Equal if the tokens are, and the log-probabilities up to rounding: a cached prompt is computed in other parts."""

    token_ids: list[list[int]]
    logprobs: list[float]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Generated)
        return self.token_ids == other.token_ids and self.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def generate(llm: LLM, params: Any = GREEDY, lora_request: Any = None) -> Generated:
    results = llm.generate(PROMPTS, params, use_tqdm=False, lora_request=lora_request)
    outputs = [output.outputs[0] for output in results]
    return Generated(
        [output.token_ids for output in outputs],
        [entry[i].logprob for one in outputs for i, entry in zip(one.token_ids, one.logprobs or [], strict=False)],
    )
