"""Rotary position embedding (Su et al., 2021): the table of cosines and sines, and its stretchings for long inputs.

Owns the frequencies; the rotation itself is `kernels/rope.py`. Invariant: `cos_sin` of a position is the same in every
step, but for two types, where it depends on the length that `rope_lens` gives: "dynamic", and "longrope", which has one
set of frequencies for contexts up to the original length and another one for all positions of longer contexts.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.config import RopeConfig
from nanovllm.kernels.take_rows import take_rows


class RotaryEmbedding(nn.Module):
    """positions [num_tokens] -> cos_sin [num_tokens, head_dim] float32: head_dim / 2 cosines, then as many sines."""

    def __init__(self, head_dim: int, max_len: int, rope: RopeConfig) -> None:
        super().__init__()
        self.rotary_dim = int(head_dim * rope.share)
        self.head_dim = head_dim
        self.rope = rope
        self.table: Tensor
        self.long_table: Tensor
        # Where tensors have no memory, only sizes count; and for arithmetic there, torch imports its whole compiler.
        is_meta = torch.get_default_device().type == "meta"
        for name, table in self._empty_tables(max_len) if is_meta else self._tables(max_len):
            self.register_buffer(name, table, persistent=False)

    def _empty_tables(self, max_len: int) -> Iterator[tuple[str, Tensor]]:
        yield "table", torch.empty(max_len, self.head_dim)
        if self.rope.rope_type == "longrope":
            yield "long_table", torch.empty(self.rope.parameters["original_max_position_embeddings"], self.head_dim)

    def _tables(self, max_len: int) -> Iterator[tuple[str, Tensor]]:
        rope = self.rope
        inv_freq, scale = _frequencies(self.rotary_dim, rope)
        positions = torch.arange(max_len, dtype=torch.float32)[:, None]
        angles = positions * inv_freq
        if rope.rope_type == "longrope":
            original = rope.parameters["original_max_position_embeddings"]
            long_angles = positions * (inv_freq / torch.tensor(rope.parameters["long_factor"]))
            angles = positions * (inv_freq / torch.tensor(rope.parameters["short_factor"]))
            angles[original:] = long_angles[original:]  # a token there is always part of a long context
            yield "long_table", self._cos_sin(long_angles[:original], scale)
        yield "table", self._cos_sin(angles, scale)

    def forward(self, positions: Tensor, rope_lens: Tensor | None = None) -> Tensor:
        """rope_lens [num_tokens]: the length of the context that the token counts as part of.

        Without them, longrope takes each token to be the last one of its context.
        """
        if rope_lens is None or self.rope.rope_type not in ("dynamic", "longrope"):
            return take_rows(self.table, positions)
        if self.rope.rope_type == "longrope":
            original = self.rope.parameters["original_max_position_embeddings"]
            is_changed = (rope_lens > original) & (positions < original)
            changed = take_rows(self.long_table, positions.clamp(max=len(self.long_table) - 1))
            return torch.where(is_changed[:, None], changed, take_rows(self.table, positions))
        inv_freq = _dynamic_frequencies(self.rotary_dim, self.rope, rope_lens)  # [num_tokens, rotary_dim / 2]
        return self._cos_sin(positions[:, None].float() * inv_freq)

    def _cos_sin(self, angles: Tensor, scale: float = 1.0) -> Tensor:
        """Pairs beyond the rotated ones are turned by an angle of 0, and not scaled."""
        padding = (0, (self.head_dim - self.rotary_dim) // 2)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        return torch.cat((F.pad(cos, padding, value=1.0), F.pad(sin, padding)), dim=-1)


def halves_order(head_dim: int, rope: RopeConfig) -> Tensor:
    """An order of a head's dimensions in which a partial rotation is a whole one, for the rows of q and k. [head_dim]

    The checkpoint rotates pairs (i, i + rotary_dim / 2); kernels rotate (i, i + head_dim / 2). Scores do not depend on
    the order of the dimensions, as long as q and k agree on it.

        checkpoint    [ a0 a1 | b0 b1 | c0 c1 c2 c3 ]        a, b: rotated        c: not rotated
        here          [ a0 a1   c0 c1 | b0 b1   c2 c3 ]      pairs (a0, b0), (a1, b1), and (c0, c2), (c1, c3) by 0
    """
    rotary_dim = int(head_dim * rope.share)
    a, b = torch.arange(rotary_dim, device="cpu").chunk(2)
    c, d = torch.arange(rotary_dim, head_dim, device="cpu").chunk(2)
    return torch.cat((a, c, b, d))


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
