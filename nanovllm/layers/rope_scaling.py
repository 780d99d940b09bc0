"""Rotary frequencies, and how they are stretched for inputs longer than a model was first trained on.

Owns the arithmetic from a `RopeConfig` to cosines and sines. Invariant: those of a position depend on nothing else, but
for two types, where they depend on the length of the context as well: "dynamic", and "longrope", which has one set of
frequencies for contexts up to the original length and another one for all positions of longer contexts.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.gather_rows import gather_rows
from nanovllm.model_config import RopeConfig

LENGTH_DEPENDENT = ("dynamic", "longrope")


def rope_tables(head_dim: int, max_len: int, rope: RopeConfig) -> Iterator[tuple[str, Tensor]]:
    """By name: "table" [max_len, head_dim], and for longrope "long_table", of early positions in long contexts."""
    original = rope.parameters["original_max_position_embeddings"] if rope.rope_type == "longrope" else 0
    if torch.get_default_device().type == "meta":
        # Where tensors have no memory, only sizes count; and for arithmetic there, torch imports its whole compiler.
        yield "table", torch.empty(max_len, head_dim)
        if rope.rope_type == "longrope":
            yield "long_table", torch.empty(original, head_dim)
        return
    inv_freq, scale = _frequencies(_rotary_dim(head_dim, rope), rope)
    positions = torch.arange(max_len, dtype=torch.float32)[:, None]
    angles = positions * inv_freq
    if rope.rope_type == "longrope":
        long_angles = positions * (inv_freq / torch.tensor(rope.parameters["long_factor"]))
        angles = positions * (inv_freq / torch.tensor(rope.parameters["short_factor"]))
        angles[original:] = long_angles[original:]  # a token there is always part of a long context
        yield "long_table", _cos_sin(head_dim, long_angles[:original], scale)
    yield "table", _cos_sin(head_dim, angles, scale)


def cos_sin_of_lengths(
    head_dim: int, rope: RopeConfig, tables: Mapping[str, Tensor], positions: Tensor, rope_lens: Tensor
) -> Tensor:
    """Of tokens in contexts of these lengths, both [num_tokens]; for LENGTH_DEPENDENT types. [num_tokens, head_dim]"""
    if rope.rope_type == "longrope":
        original, long_table = rope.parameters["original_max_position_embeddings"], tables["long_table"]
        is_changed = (rope_lens > original) & (positions < original)
        changed = gather_rows(long_table, positions.clamp(max=len(long_table) - 1))
        return torch.where(is_changed[:, None], changed, gather_rows(tables["table"], positions))
    inv_freq = _dynamic_frequencies(_rotary_dim(head_dim, rope), rope, rope_lens)  # [num_tokens, rotary_dim / 2]
    return _cos_sin(head_dim, positions[:, None].float() * inv_freq)


def _rotary_dim(head_dim: int, rope: RopeConfig) -> int:
    return int(head_dim * rope.share)


def _cos_sin(head_dim: int, angles: Tensor, scale: float = 1.0) -> Tensor:
    """Pairs beyond the rotated ones are turned by an angle of 0, and not scaled."""
    padding = (0, head_dim // 2 - angles.shape[-1])
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((F.pad(cos, padding, value=1.0), F.pad(sin, padding)), dim=-1)


def _base_frequencies(head_dim: int, theta: float) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def _frequencies(head_dim: int, rope: RopeConfig) -> tuple[Tensor, float]:
    """Radians per position for each pair of dimensions, and a factor on cosines and sines."""
    inv_freq = _base_frequencies(head_dim, rope.theta)
    if rope.rope_type == "linear":  # position interpolation (Chen et al., 2023)
        return inv_freq / rope.parameters["factor"], 1.0
    if rope.rope_type == "llama3":
        return _llama3_frequencies(inv_freq, rope.parameters), 1.0
    if rope.rope_type == "longrope":  # Ding et al., 2024; the factors differ for short and for long contexts
        return inv_freq, rope.parameters["attention_factor"]
    if rope.rope_type == "proportional":  # of a head's pairs, only the first ones turn, as they would in a whole head
        inv_freq[int(rope.parameters["rotated_share"] * head_dim // 2) :] = 0
        return inv_freq / rope.parameters.get("factor", 1.0), 1.0
    if rope.rope_type == "yarn":
        return _yarn_frequencies(head_dim, inv_freq, rope)
    return inv_freq, 1.0


def _llama3_frequencies(inv_freq: Tensor, parameters: Mapping[str, Any]) -> Tensor:
    """Long wavelengths are stretched, short ones kept, those between blended (Llama 3.1's rule)."""
    factor = parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # in the original length
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * (kept + (1 - kept) / factor)


def _yarn_frequencies(head_dim: int, inv_freq: Tensor, rope: RopeConfig) -> tuple[Tensor, float]:
    """YaRN (Peng et al., 2023): interpolate by parts, and sharpen attention by a factor on cosines and sines."""
    parameters = rope.parameters
    factor = parameters["factor"]
    original = parameters["original_max_position_embeddings"]

    def dimension_of(turns: float) -> float:
        """The dimension pair that turns this often within the original length."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first = dimension_of(parameters.get("beta_fast") or 32)
    last = dimension_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    span = max(last - first, 0.001)
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / span).clamp(0, 1)
    return inv_freq * (stretched / factor + (1 - stretched)), _yarn_attention_factor(parameters, factor)


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return magnitude(mscale) / magnitude(mscale_all_dim)
    return magnitude(1.0)


def _dynamic_frequencies(head_dim: int, rope: RopeConfig, lengths: Tensor) -> Tensor:
    """NTK-aware scaling that grows with the context once it is longer than the original length."""
    factor, original = rope.parameters["factor"], rope.parameters["original_max_position_embeddings"]
    lengths = lengths.float().clamp(min=original)
    stretch = (factor * lengths / original - (factor - 1)) ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=lengths.device) / head_dim
    return 1.0 / (rope.theta * stretch)[:, None] ** exponents
