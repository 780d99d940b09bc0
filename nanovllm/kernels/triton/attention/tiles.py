"""Building blocks of attention kernels: tiles of the paged KV cache, and the online-softmax update.

Owns where a tile lies, the two ways to load it and the arithmetic of the online softmax; `paged_attention.py` says what
comes out. Invariant: maxima and scores are exponents of 2, and a maximum is never infinite.

A tile is loaded through pointers, or, where the device has a tensor memory accelerator and the tile lies in one piece,
by that unit: one thread asks for all of it, and no register holds an address. That unit knows no mask inside a tile.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.kernels.attention_types import AttentionShape
from nanovllm.kernels.triton.attention.cells import halves_of, key_scales, load_pairs, value_scales
from nanovllm.kernels.triton.common.device_limits import compute_capability
from nanovllm.kernels.triton.common.sizes import next_power_of_2

LOG2_E = 1.4426950408889634
# A running maximum starts here rather than at -inf, so that differences of maxima are never inf - inf.
LOWEST = tl.constexpr(-1.0e30)
LOG2_OF_E = tl.constexpr(LOG2_E)
REGISTERS = 65536  # of a multiprocessor


# --- where a tile lies ----------------------------------------------------------------------------


@triton.jit
def blocks_of_tile(table_ptr, first_token, seq_len, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Where the tile at `first_token` lies: one block id if it is inside one block, else one id per token."""
    if BLOCK_SIZE % TILE == 0:
        return tl.load(table_ptr + first_token // BLOCK_SIZE, mask=first_token < seq_len, other=0)
    else:
        token = first_token + tl.arange(0, TILE)
        return tl.load(table_ptr + token // BLOCK_SIZE, mask=token < seq_len, other=0)


@triton.jit
def offsets_of_tile(
    blocks, first_token, head,
    STRIDE_BLOCK: tl.constexpr, STRIDE_HEAD: tl.constexpr, STRIDE_TOKEN: tl.constexpr,
    TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Offset in the cache of each token of the tile."""
    base = blocks.to(tl.int64) * STRIDE_BLOCK + head * STRIDE_HEAD
    if BLOCK_SIZE % TILE == 0:
        return base + (first_token % BLOCK_SIZE) * STRIDE_TOKEN + tl.arange(0, TILE) * STRIDE_TOKEN
    else:
        return base + (first_token + tl.arange(0, TILE)) % BLOCK_SIZE * STRIDE_TOKEN


@triton.jit
def load_tile(
    cache_ptr, blocks, t, seq_len, head,
    cache_stride_kv, STRIDE_BLOCK: tl.constexpr, STRIDE_HEAD: tl.constexpr, STRIDE_TOKEN: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """Keys and values of tile t, each [TILE, BLOCK_DIM], or [TILE, BLOCK_DIM / 2] words of codes, through pointers.
    blocks: `blocks_of_tile`'s."""
    WORD: tl.constexpr = 2 if cache_ptr.dtype.element_ty.primitive_bitwidth == 8 else 1
    if WORD == 2:
        cache_ptr = cache_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
        cache_stride_kv //= 2
    dim = tl.arange(0, BLOCK_DIM // WORD)
    dim_mask = (dim < HEAD_DIM // WORD)[None, :]
    offset = offsets_of_tile(
        blocks, t * TILE, head, STRIDE_BLOCK // WORD, STRIDE_HEAD // WORD, STRIDE_TOKEN // WORD, TILE, BLOCK_SIZE
    )
    tile_ptr = cache_ptr + offset[:, None] + dim[None, :]
    if RAGGED:
        mask = (tl.arange(0, TILE) < seq_len - t * TILE)[:, None] & dim_mask
        k = tl.load(tile_ptr, mask=mask, other=0)
        v = tl.load(tile_ptr + cache_stride_kv, mask=mask, other=0)
    elif BLOCK_DIM == HEAD_DIM:
        k = tl.load(tile_ptr)
        v = tl.load(tile_ptr + cache_stride_kv)
    else:
        k = tl.load(tile_ptr, mask=dim_mask, other=0)
        v = tl.load(tile_ptr + cache_stride_kv, mask=dim_mask, other=0)
    return k, v


@triton.jit
def row_of_tile(block, first_token, head, NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """First row of the tile's keys in the cache of `tile_descriptor`; its values are `cache_stride_kv` further on."""
    return (block * NUM_KV_HEADS + head) * BLOCK_SIZE + first_token % BLOCK_SIZE


def tile_descriptor(kv_cache: Tensor, tile: int) -> TensorDescriptor | None:
    """The cache as rows of a head's tokens, of numbers or of words of codes, loaded `tile` at a time; None where it
    must be loaded through pointers."""
    columns = block_columns(kv_cache.shape[4])  # those beyond head_dim are loaded as zeros
    if kv_cache.element_size() == 1:
        kv_cache, columns = kv_cache.view(torch.int16), columns // 2
    block_size, head_dim = kv_cache.shape[3:]
    row_bytes = head_dim * kv_cache.element_size()
    is_in_rows = kv_cache.is_contiguous() and row_bytes % 16 == 0 and kv_cache.numel() // head_dim < 2**31
    if not is_in_rows or block_size % tile or not has_tile_loads(kv_cache.device):
        return None
    return TensorDescriptor.from_tensor(kv_cache.view(-1, head_dim), [tile, columns])


def has_tile_loads(device: torch.device) -> bool:
    """True from compute capability 9.0 on, and in the interpreter."""
    return device.type != "cuda" or compute_capability(device)[0] >= 9


@triton.jit
def fence_tile_loads():
    """Lets the unit that loads tiles see what the kernel ahead stored: its reads are not ordered behind `gdc_wait`."""
    tl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.u32 $0, $1;", "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1
    )


def block_columns(head_dim: int) -> int:
    """BLOCK_DIM of kernels: tl.dot takes no fewer than 16, and codes come in halves."""
    return max(32, next_power_of_2(head_dim))


# --- softmax --------------------------------------------------------------------------------------


@triton.jit
def start_softmax(sinks_ptr, query_head, mask, BLOCK_DIM: tl.constexpr):
    """Maximum, sum and output of rows before their first key: of nothing, or of their sinks. query_head [ROWS].

    mask: of the rows whose sinks are taken in here. A sink is a key like others, but without a value; who has the first
    keys of a row has it.
    """
    ROWS: tl.constexpr = query_head.shape[0]
    top = tl.full([ROWS], LOWEST, tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    if sinks_ptr is not None:
        top = tl.load(sinks_ptr + query_head, mask=mask, other=LOWEST) * LOG2_OF_E
        norm = mask.to(tl.float32)
    return top, norm, tl.zeros([ROWS, BLOCK_DIM], tl.float32)


@triton.jit
def scores_of_tile(q, k, pairs, scale, SOFTCAP: tl.constexpr, CODES: tl.constexpr):
    """q k^T, which `update_softmax` multiplies by `scale`; with a soft-cap, exponents of 2 already. q, k, pairs, CODES:
    `attend_tile`'s. scale, SOFTCAP: `layer_arguments`'."""
    k = tl.trans(k)
    if pairs is None:
        scores = tl.dot(q.to(k.dtype), k, input_precision="ieee")
    else:
        q_even, q_odd = q
        even, odd = halves_of(k, q_even, CODES)
        scores = tl.dot(q_even.to(even.dtype), even, input_precision="ieee")
        scores = tl.dot(q_odd.to(odd.dtype), odd, scores, input_precision="ieee") * key_scales(pairs)[None, :]
    return apply_softcap(scores, scale, SOFTCAP)


@triton.jit
def apply_softcap(scores, scale, SOFTCAP: tl.constexpr):
    if SOFTCAP > 0.0:
        scores = SOFTCAP - 2.0 * SOFTCAP / (1.0 + tl.exp2(scores * scale))  # tanh(x) = 1 - 2 / (1 + e^(2 x))
    return scores


@triton.jit
def update_softmax(top, norm, acc, scores, v, pairs, scale, SOFTCAP: tl.constexpr):
    """One tile more in the online softmax (Milakov and Gimelshein, 2018): the new running maximum, sum and output."""
    top, norm, decay, weights = weights_of_tile(top, norm, scores, pairs, scale, SOFTCAP)
    return top, norm, tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")


@triton.jit
def weights_of_tile(top, norm, scores, pairs, scale, SOFTCAP: tl.constexpr):
    """What `update_softmax` does before the product: the new running maximum and sum, by how much the output so far
    decays, and the weights of the tile's values.

    pairs: `load_pairs`'. The exponent of a value's scale is added to its score's, and leaves the sum again: so weights
    stay below 2 with the scale, and float16, which has few exponents, takes those that count.
    """
    if SOFTCAP > 0.0:
        scale = 1.0
    if pairs is not None:
        exponent, inverse, rest = value_scales(pairs)
        scores = scores * scale + exponent[None, :]
        scale = 1.0
    # The product with `scale` and the difference are one instruction for a score, as the maximum was taken before.
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
    decay = tl.exp2(top - new_top)
    weights = tl.exp2(scores * scale - new_top[:, None])
    if pairs is None:
        norm = norm * decay + tl.sum(weights, axis=1)
    else:
        norm = norm * decay + tl.sum(weights * inverse[None, :], axis=1)
        weights *= rest[None, :]
    return new_top, norm, decay, weights


@triton.jit
def attend_tiles(
    top,
    norm,
    acc,
    q,
    cache_ptr,
    pairs_ptr,
    cache_desc,
    table_ptr,
    blocks,
    query_position,
    begin,
    end,
    whole_from,
    whole_to,
    seq_len,
    head,
    cache_stride_kv,
    STRIDE_BLOCK: tl.constexpr,
    STRIDE_HEAD: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    RAGGED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """The online softmax over tiles begin .. end of keys, of which every query sees whole_from .. whole_to whole.

    pairs_ptr: None if the cache holds numbers; otherwise q and acc are halves (`in_halves`). blocks: `blocks_of_tile`'s
    for the first. cache_desc: None to load them through pointers. query_position: a number or [ROWS, 1]. RAGGED: a tile
    may reach beyond the last token, and what lies there may be anything: it is left out, or, of a tile loaded whole,
    its values are, and its keys by the position.
    """
    for t in tl.range(begin, end, num_stages=NUM_STAGES):
        if cache_desc is not None:
            tile_row = row_of_tile(blocks, t * TILE, head, NUM_KV_HEADS, BLOCK_SIZE)
            k = cache_desc.load([tile_row, 0])
            v = cache_desc.load([tile_row + (cache_stride_kv // HEAD_DIM).to(tl.int32), 0])
            if RAGGED and pairs_ptr is None:  # codes are never NaN
                v = tl.where((t * TILE + tl.arange(0, TILE) < seq_len)[:, None], v, 0.0)
        else:
            k, v = load_tile(
                cache_ptr, blocks, t, seq_len, head,
                cache_stride_kv, STRIDE_BLOCK, STRIDE_HEAD, STRIDE_TOKEN,
                HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, TILE, RAGGED,
            )  # fmt: skip
        pairs = None
        if pairs_ptr is not None:
            pairs = load_pairs(pairs_ptr, blocks, t, seq_len, head, NUM_KV_HEADS, BLOCK_SIZE, TILE, RAGGED)
        # Read one tile ahead, so that the loads above never wait for it and can be pipelined.
        blocks = blocks_of_tile(table_ptr, (t + 1) * TILE, seq_len, TILE, BLOCK_SIZE)
        top, norm, acc = attend_tile(
            top, norm, acc, q, k, v, pairs, t, query_position, whole_from, whole_to, scale, TILE, WINDOW, SOFTCAP,
            cache_ptr.dtype.element_ty,
        )  # fmt: skip
    return top, norm, acc


@triton.jit
def attend_tile(
    top, norm, acc, q, k, v, pairs, t, query_position, whole_from, whole_to, scale,
    TILE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """`attend_tiles` for tile t, which is here already. pairs: `load_pairs`', None if the cache holds numbers.

    Otherwise q and acc are halves, and k and v words of codes in the dtype CODES.
    """
    scores = scores_of_tile(q, k, pairs, scale, SOFTCAP, CODES)
    if (t < whole_from) | (t >= whole_to):
        token, last = tl.arange(0, TILE)[None, :], query_position - t * TILE
        visible = token <= last
        if WINDOW:
            visible = visible & (token > last - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
    if pairs is None:
        return update_softmax(top, norm, acc, scores, v, pairs, scale, SOFTCAP)
    else:
        top, norm, decay, weights = weights_of_tile(top, norm, scores, pairs, scale, SOFTCAP)
        acc_even, acc_odd = acc
        even, odd = halves_of(v, q[0], CODES)
        acc_even = tl.dot(weights.to(even.dtype), even, acc_even * decay[:, None], input_precision="ieee")
        acc_odd = tl.dot(weights.to(odd.dtype), odd, acc_odd * decay[:, None], input_precision="ieee")
        return top, norm, (acc_even, acc_odd)


# --- launches -------------------------------------------------------------------------------------


@cache
def layer_arguments(shape: AttentionShape, block_size: int) -> dict[str, int | float]:
    """What every attention kernel is told of a layer, by the names of its parameters; not to be changed.

    scale, SOFTCAP: for `scores_of_tile` and `update_softmax`, so that 2 to an exponent is e to the score.
    """
    scale, softcap = shape.scale * LOG2_E, 0.0
    if shape.softcap is not None:
        scale, softcap = 2 * shape.scale / shape.softcap * LOG2_E, shape.softcap * LOG2_E
    return {
        "scale": scale,
        "SOFTCAP": softcap,
        "NUM_KV_HEADS": shape.num_kv_heads,
        "GROUP": shape.num_heads // shape.num_kv_heads,
        "HEAD_DIM": shape.head_dim,
        "BLOCK_DIM": block_columns(shape.head_dim),
        "BLOCK_SIZE": block_size,
    }


@cache
def launch_options(num_stages: int, num_warps: int, occupancy: int) -> dict[str, int]:
    """Pipeline depth, warps, and registers of a thread, such that `occupancy` programs share a multiprocessor."""
    registers = min(REGISTERS // (occupancy * num_warps * 32) // 8 * 8, 255)
    return {"NUM_STAGES": num_stages, "num_warps": num_warps, "maxnreg": registers}


@cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count
