"""What each kind of step takes the first time and the second, on an engine that has just become ready.

Owns the list of kinds. Invariant: both times a kind does the same with other tokens, and nothing of a prefix cache; the
kinds come in one order, so a kernel or graph that several of them need is seen where it comes first.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams

LIMIT_SECONDS = {"cold": 1.0, "warm": 0.2}  # what the first time may take beyond the second


@dataclass(frozen=True)
class Kind:
    """lens: of the prompts. asks: fields of SamplingParams."""

    name: str
    lens: Sequence[int]
    max_tokens: int = 1
    asks: dict[str, Any] = field(default_factory=dict)


def kinds(max_model_len: int, max_num_seqs: int) -> Iterator[Kind]:
    """Those that fit."""
    for kind in _all_kinds():
        length = max(kind.lens) + kind.max_tokens
        if length <= max_model_len and len(kind.lens) * kind.asks.get("n", 1) <= max_num_seqs:
            yield kind


def _all_kinds() -> Iterator[Kind]:
    yield Kind("a prompt of 128 tokens", [128])
    for count, length in ((8, 128), (64, 128), (32, 512), (200, 512), (8, 2048), (1, 16384), (1, 32768)):
        yield Kind(f"{count} prompt{'s' * (count > 1)} of {length:,}", [length] * count)
    for size in (1, 2, 4, 8, 12, 16, 32, 64, 128, 256):
        yield Kind(f"decodes of {size}", [16] * size, 4)
    for size, length in ((1, 8192), (1, 32768), (4, 8192), (16, 2048)):
        yield Kind(f"decodes of {size} behind {length:,} tokens", [length] * size, 4)
    for size in (4, 32, 200):
        yield Kind(f"{size} decodes beside a long prompt", [16] * size + [20000], 6)
        yield Kind(f"{size} decodes beside prompts that follow", [600] * size + [1500] * 30, 6)
    yield Kind("4 prompts of 1,024 with 16 outputs each", [1024] * 4, 6, {"n": 16, "temperature": 1.0})
    yield Kind("2 prompts of 1,024 with 4 outputs each", [1024] * 2, 6, {"n": 4, "temperature": 1.0})
    for size in (1, 64):
        yield Kind(f"log-probabilities for {size}", [64] * size, 4, {"logprobs": 5})
        yield Kind(f"penalties for {size}", [64] * size, 4, {"presence_penalty": 0.5})
        yield Kind(f"logit_bias for {size}", [64] * size, 4, {"logit_bias": {5: 1.0}})
        yield Kind(
            f"filters for {size}", [64] * size, 4, {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
        )
    yield Kind("log-probabilities of a prompt", [300], 1, {"prompt_logprobs": 1})


def measure(llm: LLM, compiled: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each kind. compiled: a list that grows by the name of each kernel that is compiled or loaded."""
    rows = []
    for number, kind in enumerate(kinds(llm.config.max_model_len, llm.config.max_num_seqs)):
        before = len(compiled)
        first = _seconds(llm, kind, seed=2 * number)
        kernels = list(compiled[before:])
        second = _seconds(llm, kind, seed=2 * number + 1)
        rows.append({"kind": kind.name, "first_seconds": first, "second_seconds": second, "kernels": kernels})
    return rows


def _seconds(llm: LLM, kind: Kind, seed: int) -> float:
    rng = random.Random(seed)
    highest = llm.model_config.vocab_size - 1
    prompts = [[rng.randint(0, min(highest, 10000)) for _ in range(length)] for length in kind.lens]
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": kind.max_tokens, "ignore_eos": True, **kind.asks})
    llm.reset_prefix_cache()
    start = perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return perf_counter() - start
