"""Attention of long prompts on Hopper GPUs: one warp loads keys and values, and of two groups of warps one multiplies
while the other is at its softmax (FlashAttention-3, Shah et al., 2024).

Owns what each warp does and when, which Gluon, Triton's lower level, lets a kernel say; `prefill.py` owns the order of
the tiles of queries and computes what this kernel does not take. Invariant: the results are `prefill.py`'s but for
rounding, whatever lies in cells of the cache behind a request's last token.

    loader       for each tile of 128 keys, the last first: wait until its place is free, then ask the tensor memory
                 accelerator for keys and for values, block by block, which says when they are there
    2 consumers  64 rows of queries each, which share a tile. While its scores of one tile become weights, the tensor
                 cores multiply the weights of the tile before with their values, and work for the other consumer

A row is a token and a head of the group that shares a KV head, as in `prefill.py`. A place in shared memory holds a
tile as the tensor cores want it: columns of 64, of each the rows of all blocks below each other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.triton.attention.prefill import LONG_PROMPT, PrefillConfig, PrefillPlan
from nanovllm.kernels.triton.attention.tiles import LOG2_E
from nanovllm.kernels.triton.common.launch import launch

CONFIG = PrefillConfig(rows=128, tile=128)  # for `plan_prefill`
STAGES = 2  # places for tiles of keys, and as many for values

LOWEST = gl.constexpr(-1.0e30)  # as in `tiles.py`
LOG2_OF_E = gl.constexpr(LOG2_E)
ROWS = gl.constexpr(64)  # of a consumer
TILE = gl.constexpr(128)
COLUMN = gl.constexpr(64)  # elements of 2 bytes: as wide as shared memory is swizzled
SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))


@gluon.jit
def _wait_for_kernel_ahead():
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.u32 $0, $1;", "=r,r", [gl.program_id(0)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _fence_tile_loads():
    """As `tiles.fence_tile_loads`."""
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.u32 $0, $1;", "=r,r", [gl.program_id(0)], dtype=gl.int32, is_pure=False, pack=1
    )


# --- places for tiles: (memory, barriers "it is there", barriers "it is free") of STAGES places --------------------


@gluon.jit
def _make_places(dtype: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr):
    parts: gl.constexpr = TILE // BLOCK_SIZE * (HEAD_DIM // COLUMN)
    memory = gl.allocate_shared_memory(dtype, [STAGES * parts, BLOCK_SIZE, COLUMN], SHARED)
    there = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(there.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)  # both consumers
    return memory, there, free


@gluon.jit
def _load(places, nth, cache_desc, table_ptr, tile, num_blocks, first_row, rows_of_block, HEAD_DIM: gl.constexpr):
    """Ask for the nth tile that this ring of places takes. first_row: of block 0 in the cache."""
    memory, there, free = places
    STAGES: gl.constexpr = there.shape[0]
    BLOCK_SIZE: gl.constexpr = memory.shape[1]
    BLOCKS: gl.constexpr = TILE // BLOCK_SIZE
    COLUMNS: gl.constexpr = HEAD_DIM // COLUMN
    stage = nth % STAGES
    mbarrier.wait(free.index(stage), (nth // STAGES + 1) & 1)  # at once for the first ones
    barrier = there.index(stage)
    mbarrier.expect(barrier, TILE * HEAD_DIM * 2)
    for part in gl.static_range(BLOCKS):
        number = tile * BLOCKS + part
        block = gl.load(table_ptr + number, mask=number < num_blocks, other=0)
        for column in gl.static_range(COLUMNS):
            tma.async_copy_global_to_shared(
                cache_desc,
                [first_row + block * rows_of_block, column * COLUMN],
                barrier,
                memory.index((stage * COLUMNS + column) * BLOCKS + part),
            )


@gluon.jit
def _take(places, nth, HEAD_DIM: gl.constexpr):
    """The nth tile [TILE, HEAD_DIM], once it is there."""
    memory, there, _ = places
    STAGES: gl.constexpr = there.shape[0]
    parts: gl.constexpr = TILE // memory.shape[1] * (HEAD_DIM // COLUMN)
    stage = nth % STAGES
    mbarrier.wait(there.index(stage), (nth // STAGES) & 1)
    return memory.index(stage * parts)._reinterpret(memory.dtype, [TILE, HEAD_DIM], SHARED)


@gluon.jit
def _release(places, nth):
    _, there, free = places
    STAGES: gl.constexpr = there.shape[0]
    mbarrier.arrive(free.index(nth % STAGES))


# --- the loader ------------------------------------------------------------------------------------------------------


@gluon.jit
def _load_tiles(keys, values, cache_desc, where, num_tiles, HEAD_DIM: gl.constexpr):
    table_ptr, num_blocks, key_row, value_row, rows_of_block = where
    _fence_tile_loads()
    for nth in range(num_tiles):
        tile = num_tiles - 1 - nth
        _load(keys, nth, cache_desc, table_ptr, tile, num_blocks, key_row, rows_of_block, HEAD_DIM)
        _load(values, nth, cache_desc, table_ptr, tile, num_blocks, value_row, rows_of_block, HEAD_DIM)


# --- a consumer ------------------------------------------------------------------------------------------------------


@gluon.jit
def _start_scores(q, keys, nth, HEAD_DIM: gl.constexpr, layout: gl.constexpr):
    zero = gl.zeros([ROWS, TILE], gl.float32, layout)
    return warpgroup_mma(q, _take(keys, nth, HEAD_DIM).permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def _operand(weights, dtype: gl.constexpr, layout: gl.constexpr):
    return gl.convert_layout(weights, gl.DotOperandLayout(0, layout, 2)).to(dtype)


@gluon.jit
def _start_output(weights, values, nth, acc, HEAD_DIM: gl.constexpr):
    return warpgroup_mma(weights, _take(values, nth, HEAD_DIM), acc, is_async=True)


@gluon.jit
def _masked(scores, tile, query_position, layout: gl.constexpr):
    token = tile * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(0, layout))
    return gl.where(gl.expand_dims(token, 0) <= gl.expand_dims(query_position, 1), scores, float("-inf"))


@gluon.jit
def _softmax(scores, top, scale):
    """The part of `tiles.update_softmax` before the product: weights; by how much what was before decays; the maximum;
    and the sums [ROWS, 4] of the weights that each of the four threads of a row has, which meet behind all tiles."""
    new_top = gl.maximum(top, gl.max(scores, axis=1) * scale)
    decay = gl.exp2(top - new_top)
    weights = gl.exp2(scores * scale - gl.expand_dims(new_top, 1))
    by_thread = weights.reshape([ROWS, TILE // 8, 4, 2])
    return weights, decay, new_top, gl.sum(gl.sum(by_thread, axis=3), axis=1)


@gluon.jit
def _decayed(norm, decay):
    return norm * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, norm.type.layout)), 1)


@gluon.jit
def _before_what_follows(norm):
    """Sums [ROWS, 4] as they are, computed before anything that is waited for below.

    The assembler moves a wait for the tensor cores to the front of all arithmetic that does not need their results.
    The softmax would then stand behind the product that it is to run beside. No wait is moved across a way out, which
    is taken by no sum.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.lt.f32 p, $2, 0f00000000; @p exit; mov.f32 $0, $2; mov.f32 $1, $3; }", "=f,=f,f,f",
        [norm], dtype=gl.float32, is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit
def _zero_behind(values, first_token, seq_len, HEAD_DIM: gl.constexpr):
    """Cells behind the last token hold anything, NaN too, of which a weight of 0 makes no 0."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    tile = _take(values, 0, HEAD_DIM)
    token = first_token + gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))
    tile.store(gl.where(gl.expand_dims(token < seq_len, 1), tile.load(layout), 0.0))
    fence_async_shared()


@gluon.jit
def _attend(
    num_tiles, num_masked, q, keys, values, weights, acc, top, norm, query_position, scale,
    HEAD_DIM: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """All tiles but the first that was loaded. weights: of that one, whose product is yet to come; the last tile's are
    returned like this."""
    for nth in range(1, num_tiles):
        scores = _start_scores(q, keys, nth, HEAD_DIM, s_layout)
        acc = _start_output(weights, values, nth - 1, acc, HEAD_DIM)
        scores = warpgroup_mma_wait(1, deps=[scores])
        _release(keys, nth)
        if nth < num_masked:
            scores = _masked(scores, num_tiles - 1 - nth, query_position, s_layout)
        weights, decay, top, sums = _softmax(scores, top, scale)
        weights = _operand(weights, values[0].dtype, o_layout)
        norm = _before_what_follows(_decayed(norm, decay) + sums)
        acc = warpgroup_mma_wait(0, deps=[acc])
        _release(values, nth - 1)
        acc = acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, o_layout)), 1)
    return weights, acc, top, norm


@gluon.jit
def _consume(
    consumer: gl.constexpr, q_memory, keys, values, cleaned, work,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    out_ptr, sinks_ptr, first_token, first_position, seq_len, num_tiles, head, scale = work
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    row = consumer * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    query_position = first_position + row // GROUP
    num_masked = num_tiles - gl.minimum(gl.maximum(first_position + 1, 0) // TILE, num_tiles - 1)
    q = q_memory.index(consumer)

    top = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, s_layout))
    norm = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, s_layout))
    if sinks_ptr is not None:  # as `tiles.start_softmax`
        top = gl.load(sinks_ptr + head * GROUP + row % GROUP) * LOG2_OF_E
        norm += 1.0
    acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, o_layout)
    scores = warpgroup_mma_wait(0, deps=[_start_scores(q, keys, 0, HEAD_DIM, s_layout)])
    _release(keys, 0)
    scores = _masked(scores, num_tiles - 1, query_position, s_layout)
    weights, decay, top, sums = _softmax(scores, top, scale)
    weights = _operand(weights, values[0].dtype, o_layout)
    sink = gl.convert_layout(norm * decay, gl.SliceLayout(1, sums.type.layout))
    has_sink = gl.arange(0, 4, layout=gl.SliceLayout(0, sums.type.layout)) == 0  # one of the four threads
    norm = sums + gl.where(gl.expand_dims(has_sink, 0), gl.expand_dims(sink, 1), 0.0)
    if num_tiles * TILE > seq_len:
        if consumer == 0:
            _zero_behind(values, (num_tiles - 1) * TILE, seq_len, HEAD_DIM)
            mbarrier.arrive(cleaned)
        else:
            mbarrier.wait(cleaned, 0)
    weights, acc, top, norm = _attend(
        num_tiles, num_masked, q, keys, values, weights, acc, top, norm, query_position, scale,
        HEAD_DIM, s_layout, o_layout,
    )  # fmt: skip
    acc = _start_output(weights, values, num_tiles - 1, acc, HEAD_DIM)
    acc = warpgroup_mma_wait(0, deps=[acc])

    norm = gl.convert_layout(gl.sum(norm, axis=1), gl.SliceLayout(1, o_layout))
    result = acc / gl.expand_dims(gl.where(norm > 0, norm, 1.0), 1)
    row = consumer * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, o_layout))
    offset, is_row = _offsets(row, first_token, first_position, seq_len, head, NUM_KV_HEADS * GROUP * HEAD_DIM,
                              HEAD_DIM, GROUP)  # fmt: skip
    dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, o_layout))
    out_ptr += gl.expand_dims(offset, 1) + gl.expand_dims(dim, 0)
    gl.store(out_ptr, result.to(out_ptr.dtype.element_ty), mask=gl.expand_dims(is_row, 1))


@gluon.jit
def _offsets(row, first_token, first_position, seq_len, head, stride_token, stride_head, GROUP: gl.constexpr):
    """Where rows of the program lie in a tensor of queries or outputs, and whether there is one at all."""
    query = row // GROUP
    offset = (first_token + query).to(gl.int64) * stride_token + (head * GROUP + row % GROUP) * stride_head
    return offset, (row < 2 * ROWS // GROUP * GROUP) & (first_position + query < seq_len)


@gluon.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["query_start_ptr"])
def _prefill_hopper_kernel(
    q_ptr,
    cache_desc,
    sinks_ptr,
    out_ptr,
    query_start_ptr,
    seq_lens_ptr,
    table_ptr,
    order_ptr,
    table_stride,
    q_stride_token,
    q_stride_head,
    value_row,
    scale,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    TOKENS: gl.constexpr = 2 * ROWS // GROUP
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    if PDL:
        _wait_for_kernel_ahead()
    head = gl.program_id(0) % NUM_KV_HEADS
    place = gl.program_id(0) // NUM_KV_HEADS
    req = gl.load(order_ptr + place * 2)
    first_query = gl.load(order_ptr + place * 2 + 1)
    if req >= 0:
        query_start = gl.load(query_start_ptr + req)
        query_len = gl.load(query_start_ptr + req + 1) - query_start
        seq_len = gl.load(seq_lens_ptr + req)
        first_token, first_position = query_start + first_query, seq_len - query_len + first_query
        num_tiles = gl.maximum(gl.cdiv(gl.minimum(first_position + TOKENS, seq_len), TILE), 1)

        q_memory = gl.allocate_shared_memory(cache_desc.dtype, [2, ROWS, HEAD_DIM], SHARED)
        dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, layout))
        for consumer in gl.static_range(2):
            row = consumer * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
            offset, is_row = _offsets(row, first_token, first_position, seq_len, head, q_stride_token, q_stride_head,
                                      GROUP)  # fmt: skip
            q_ptrs = q_ptr + gl.expand_dims(offset, 1) + gl.expand_dims(dim, 0)
            q_memory.index(consumer).store(gl.load(q_ptrs, mask=gl.expand_dims(is_row, 1), other=0.0))
        keys = _make_places(cache_desc.dtype, HEAD_DIM, BLOCK_SIZE, STAGES)
        values = _make_places(cache_desc.dtype, HEAD_DIM, BLOCK_SIZE, STAGES)
        cleaned = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(cleaned, count=1)
        fence_async_shared()

        work = (out_ptr, sinks_ptr, first_token, first_position, seq_len, num_tiles, head, scale)
        key_row = head * BLOCK_SIZE
        where = (table_ptr + req.to(gl.int64) * table_stride, gl.cdiv(seq_len, BLOCK_SIZE), key_row,
                 key_row + value_row, NUM_KV_HEADS * BLOCK_SIZE)  # fmt: skip
        # Warps and registers of the second consumer and the loader; the first has four warps and what is left.
        gl.warp_specialize(
            [
                (_consume, (0, q_memory, keys, values, cleaned, work, NUM_KV_HEADS, GROUP, HEAD_DIM)),
                (_consume, (1, q_memory, keys, values, cleaned, work, NUM_KV_HEADS, GROUP, HEAD_DIM)),
                (_load_tiles, (keys, values, cache_desc, where, num_tiles, HEAD_DIM)),
            ],
            [4, 1],
            [240, 24],
        )


def is_for_hopper(cache: LayerCache, shape: AttentionShape, mean_query_len: int) -> bool:
    """Does `prefill_attention_hopper` take this layer, on a device where it runs, and is it the faster one?"""
    data = cache.data
    return (
        mean_query_len >= LONG_PROMPT
        and shape.window is None
        and shape.softcap is None
        and shape.head_dim in (64, 128)
        and shape.num_heads // shape.num_kv_heads <= 2 * ROWS.value
        and data.dtype in (torch.bfloat16, torch.float16)
        and cache.scales is None
        and TILE.value % cache.block_size == 0
        and data.is_contiguous()
        and data.numel() // shape.head_dim < 2**31
    )


def prefill_attention_hopper(
    q: Tensor,
    cache: LayerCache,
    out: Tensor,
    meta: AttentionMetadata,
    plan: PrefillPlan,
    shape: AttentionShape,
    sinks: Tensor | None = None,
) -> None:
    """As `prefill.prefill_attention`; plan: by CONFIG, for what `is_for_hopper`."""
    num_kv_heads, head_dim, data = shape.num_kv_heads, shape.head_dim, cache.data
    launch(
        _prefill_hopper_kernel, (plan.order.shape[0] * num_kv_heads,), q.device,
        q, TensorDescriptor.from_tensor(data.view(-1, head_dim), [cache.block_size, COLUMN.value], SHARED.value),
        sinks, out, meta.query_start_loc, meta.seq_lens, meta.block_table, plan.order,
        meta.block_table.stride(0), q.stride(0), q.stride(1), data.stride(0) // head_dim, shape.scale * LOG2_E,
        NUM_KV_HEADS=num_kv_heads, GROUP=shape.num_heads // num_kv_heads, HEAD_DIM=head_dim,
        BLOCK_SIZE=cache.block_size, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
