"""A KV cache in 8 bits: codes in e4m3 or int8, and a scale for each token and head.

Owns how a head's key or value becomes codes and a scale, and how cells become numbers again, in plain PyTorch; every
form of attention equals it. Invariant: a cell depends on its own row of numbers alone, so it holds the same bits
whether its token came in a prompt, in a chunk or by itself.

    scale    bfloat16, from the largest number of the row / the largest code, 127 or, of e4m3, 256; rounded up, so that
             nothing is beyond it. e4m3 reaches to 448, and its codes have an exponent, so any scale loses as little of
             most numbers; but one number of a row is often most of it, and 256 is exact of one that is a bfloat16
    code     row / scale, rounded to the nearest, ties to even

A row with an infinity or NaN is read as infinities and NaN. A row of latents (`latent_store.py`) has two scales, as the
sizes of its parts have nothing to do with each other: of the part that is rotated, which is a key alone, where others
have the key's, and of the latent, where they have the value's.
"""

import torch
from torch import Tensor

from nanovllm.kernels.attention_types import LayerCache

CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}  # by kv_cache_dtype
LARGEST = {torch.float8_e4m3fn: 256.0, torch.int8: 127.0}  # codes that are used
# Of a scale, as bits of a float32: those of a bfloat16, and the least one, 2^-60, which a row of zeros has. No bfloat16
# scale is as small otherwise unless the model's numbers underflow themselves, and its logarithm is finite.
KEPT_BITS, LEAST_BITS, INFINITY_BITS = 0x7FFF0000, 0x21800000, 0x7F800000


def cache_dtype(kv_cache_dtype: str, dtype: str) -> torch.dtype:
    """Of a cache's data, by the option's word; dtype: the model's."""
    return CODES.get(kv_cache_dtype, getattr(torch, dtype))


def row_bytes(head_dim: int, dtype: torch.dtype, num_planes: int = 2) -> int:
    """That the key, or the value, of one token and head takes in a cache of this dtype; of latents, both in one."""
    return head_dim * dtype.itemsize + (2 * torch.bfloat16.itemsize // num_planes if dtype in LARGEST else 0)


def encode(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """rows [..., head_dim] -> codes of the same shape, scales [...] bfloat16."""
    rows, largest = rows.float(), LARGEST[dtype]
    bits = (rows.abs().amax(-1) / largest).view(torch.int32).clamp(max=INFINITY_BITS)  # NaN is beyond infinity
    scales = ((bits + 0xFFFF) & KEPT_BITS).clamp(min=LEAST_BITS).view(torch.float32)
    codes = (rows / scales.unsqueeze(-1)).clamp(-largest, largest)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scales.bfloat16()


def encode_latents(rows: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """rows [..., rank + rope_dim] -> codes of the same shape, scales [..., 2] bfloat16."""
    parts = (encode(part, dtype) for part in rows.tensor_split([rank], dim=-1))
    (latent, latent_scale), (turned, turned_scale) = parts
    codes = torch.cat((latent.view(torch.int8), turned.view(torch.int8)), dim=-1).view(dtype)
    return codes, torch.stack((turned_scale, latent_scale), dim=-1)


def decode_latents(codes: Tensor, scales: Tensor, rank: int) -> Tensor:
    """The inverse: float32."""
    latent, turned = codes.float().tensor_split([rank], dim=-1)
    return torch.cat((latent * scales[..., 1:].float(), turned * scales[..., :1].float()), dim=-1)


def cells(cache: LayerCache, blocks: slice | Tensor, heads_first: bool = False, rank: int | None = None) -> Tensor:
    """Keys and values of these blocks as numbers: [2, blocks, num_kv_heads, block_size, head_dim] or [1, ...], as the
    cache has them; codes as float32.

    rank: of latents. heads_first: [2, num_kv_heads, blocks, block_size, head_dim]. A slice of a cache without codes is
    a view.
    """

    def pick(x: Tensor) -> Tensor:
        x = x.transpose(1, 2) if heads_first else x
        dim = 2 if heads_first else 1
        return x[(slice(None),) * dim + (blocks,)] if isinstance(blocks, slice) else x.index_select(dim, blocks)

    if cache.scales is None:
        return pick(cache.data)
    codes = pick(cache.data.view(torch.int8)).view(cache.data.dtype)  # e4m3 cannot be picked from everywhere
    if rank is not None:
        return decode_latents(codes, pick(cache.scales.unsqueeze(0)), rank)
    return codes.float() * pick(cache.scales.permute(3, 0, 1, 2)).float().unsqueeze(-1)
