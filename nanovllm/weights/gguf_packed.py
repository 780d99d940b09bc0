"""Blocks of a GGUF tensor as codes, scales and what code 0 stands for: the numbers of `gguf_blocks.py`, not computed.

Owns that form of the commonest blocks. Invariant: bits * scale + low are the numbers of `gguf.quants`, where bits are
the codes as they lie in memory; scales of super-blocks are rounded to float16 once they are multiplied.

    Q4_0, Q4_1, Q4_K    4 bits, two inputs in a byte
    Q8_0, Q5_K, Q6_K    a byte a code, also where the file has 5 or 6 bits
    MXFP4               of experts of gpt-oss, as its own checkpoints have it
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from nanovllm.weights.gguf_blocks import (
    fifth_bits_of_q5_k,
    halves,
    high_pairs_of_q6_k,
    scales_and_minima,
    unpack_nibbles,
)


class PackedKind(NamedTuple):
    """What `quantization/gguf.py` is told: bits of a code, inputs that share a scale, and whether there is a `low`."""

    bits: int
    group_size: int
    has_low: bool


PACKED_KINDS = {
    GGMLQuantizationType.Q4_0: PackedKind(4, 32, False),
    GGMLQuantizationType.Q4_1: PackedKind(4, 32, True),
    GGMLQuantizationType.Q8_0: PackedKind(8, 32, False),
    GGMLQuantizationType.Q4_K: PackedKind(4, 32, True),
    GGMLQuantizationType.Q5_K: PackedKind(8, 32, True),
    GGMLQuantizationType.Q6_K: PackedKind(8, 16, False),
}


def unpack_codes(rows: Tensor, kind: GGMLQuantizationType) -> dict[str, Tensor]:
    """rows uint8 [outputs, bytes] -> weight_codes, weight_scale and, where the kind has one, weight_low."""
    packed, blocks = PACKED_KINDS[kind], rows.reshape(-1, GGML_QUANT_SIZES[kind][1])
    codes, scale, low = _READERS[kind](blocks)
    codes = codes.reshape(len(rows), -1)
    if packed.bits == 4:
        first, second = codes.unflatten(1, (-1, 2, 16)).unbind(2)
        codes = (first | second << 4).flatten(1)
    result = {"weight_codes": codes.contiguous(), "weight_scale": scale}
    if low is not None:
        result["weight_low"] = low
    return {name: t if name == "weight_codes" else t.half().reshape(len(rows), -1) for name, t in result.items()}


def unpack_mxfp4(rows: Tensor) -> dict[str, Tensor]:
    """rows uint8 [num_experts, outputs, bytes] -> `blocks` and `scales` as in `quantization/mxfp4.py`.

    A block is an exponent and 16 bytes, with inputs i and i + 16 in byte i.
    """
    blocks = rows.unflatten(2, (-1, GGML_QUANT_SIZES[GGMLQuantizationType.MXFP4][1]))
    codes = torch.empty((*blocks.shape[:3], 16), dtype=torch.uint8, device=rows.device)
    for expert, of_expert in zip(codes, blocks[..., 1:], strict=True):  # which bounds what this takes beside the result
        inputs = torch.cat((of_expert & 15, of_expert >> 4), dim=-1)
        torch.bitwise_or(inputs[..., ::2], inputs[..., 1::2] << 4, out=expert)
    return {"blocks": codes, "scales": blocks[..., 0].contiguous()}


Parts = tuple[Tensor, Tensor, Tensor | None]  # codes in the order of the inputs, a byte each; scale, low by group


def _q4_0(blocks: Tensor) -> Parts:
    return unpack_nibbles(blocks[:, 2:], 16), halves(blocks[:, :2]), None


def _q4_1(blocks: Tensor) -> Parts:
    return unpack_nibbles(blocks[:, 4:], 16), halves(blocks[:, :2]), halves(blocks[:, 2:4])


def _q8_0(blocks: Tensor) -> Parts:
    return blocks[:, 2:].contiguous().view(torch.int8), halves(blocks[:, :2]), None


def _q4_k(blocks: Tensor) -> Parts:
    scales, minima = scales_and_minima(blocks)
    return unpack_nibbles(blocks[:, 16:], 32), scales, -minima


def _q5_k(blocks: Tensor) -> Parts:
    scales, minima = scales_and_minima(blocks)
    return (unpack_nibbles(blocks[:, 48:], 32) | fifth_bits_of_q5_k(blocks)).view(torch.int8), scales, -minima


def _q6_k(blocks: Tensor) -> Parts:
    scales = blocks[:, 192:208].view(torch.int8).float() * halves(blocks[:, 208:])
    return (unpack_nibbles(blocks[:, :128], 64) | high_pairs_of_q6_k(blocks)).view(torch.int8) - 32, scales, None


_READERS: dict[GGMLQuantizationType, Callable[[Tensor], Parts]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q5_K: _q5_k,
    GGMLQuantizationType.Q6_K: _q6_k,
}
