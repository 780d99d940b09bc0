"""Roofline: what a run had to read and multiply at the least, and how near it came to what the device can do.

    bytes = steps x weights + sampling steps' head + context tokens read x KV of a token + tokens computed x KV written
    FLOPs = 2 x weights x tokens + 2 x head x sampled tokens + attention: 4 x query heads x head_dim x layers x pairs
    floor = the longer of bytes / bandwidth and FLOPs / peak: reading and multiplying may overlap, neither can be less

(Williams, Waterman and Patterson, 2009.) Owns the arithmetic alone: counters come from `LLM.get_metrics()`, ceilings
from `ceilings.py`. Invariant: pure functions, so a floor can be worked out again from the counters in a JSON line.

Each request counts for what it reads by itself: where requests read a shared prefix together, or a sliding window cuts
the context short, less is needed, and the share of the floor can pass 1. Of a mixture of experts the weights of one
token's experts count; how many more the tokens of a batch need depends on their routing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """num_weights: elements of the matrices that every token passes, without the head and the embedding table.

    weight_bytes: of these matrices and the head, as they are kept.
    """

    num_weights: int
    num_head_weights: int
    weight_bytes: int
    kv_bytes_per_token: int
    num_layers: int
    num_heads: int
    head_dim: float


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the device reaches in a plain copy and a plain matrix product."""

    bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """Differences of the counters of `LLM.get_metrics()` that have these names."""

    num_steps: int
    num_tokens_computed: int
    num_tokens_sampled: int
    num_context_tokens_read: int
    num_query_key_pairs: int

    @classmethod
    def between(cls, before: Mapping[str, float], after: Mapping[str, float]) -> "Work":
        """The work done between two calls of `LLM.get_metrics()`."""
        return cls(**{name: int(after[name] - before[name]) for name in cls.__dataclass_fields__})


def count_bytes(work: Work, size: ModelSize) -> int:
    """Bytes that had to move. The head is read in every step: steps that sample nothing are rare."""
    weights = work.num_steps * size.weight_bytes
    return weights + (work.num_context_tokens_read + work.num_tokens_computed) * size.kv_bytes_per_token


def count_flops(work: Work, size: ModelSize) -> int:
    """Multiplications and additions of the matrix products and of attention."""
    products = work.num_tokens_computed * size.num_weights + work.num_tokens_sampled * size.num_head_weights
    heads = size.num_layers * size.num_heads
    return round(2 * products + 4 * work.num_query_key_pairs * heads * size.head_dim)


def report(work: Work, size: ModelSize, ceilings: Ceilings, seconds: float) -> dict[str, Any]:
    """Achieved rates, their share of the ceilings, and floor_seconds / seconds as `share_of_floor`."""
    num_bytes, flops = count_bytes(work, size), count_flops(work, size)
    floor = max(num_bytes / ceilings.bytes_per_second, flops / ceilings.flops_per_second)
    return {
        "bytes": num_bytes,
        "flops": flops,
        "bytes_per_second": num_bytes / seconds,
        "flops_per_second": flops / seconds,
        "share_of_bandwidth": num_bytes / seconds / ceilings.bytes_per_second,
        "share_of_flops": flops / seconds / ceilings.flops_per_second,
        "floor_seconds": floor,
        "share_of_floor": floor / seconds,
    }
