"""Batch-invariant attention in Triton: prompts and decodes alike, over keys that are cut in one way for all.

Owns the cut and how its parts are added up. Invariant: a token's output depends on its query and its context alone, to
the bit. A context is cut into chunks of CHUNK keys from its first token on, a row goes through each from its first key
to its last, and what the chunks came to is added up in their order, by the same instructions wherever it happens. Other
rows of its tile of queries may need keys of which it sees nothing: their weights are 0 and what was before decays by
1, which changes no bit.

Few queries would leave most of a GPU idle, so several programs take the chunks of one in turn ("Flash-Decoding", Dao et
al., 2023), and whoever is last to leave one adds them up; many have a program that goes through all of them.
"""

# Tuples of parts grow while a kernel is compiled.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.triton.attention.cells import data_of, pairs_of
from nanovllm.kernels.triton.attention.prefill import (
    LONG_PROMPT,
    PrefillPlan,
    attend_keys,
    load_queries,
    plan_prefill,
    prefill_config,
    rows_of_program,
    store_rows,
)
from nanovllm.kernels.triton.attention.tiles import (
    LOWEST,
    fence_tile_loads,
    launch_options,
    layer_arguments,
    num_multiprocessors,
    start_softmax,
    tile_descriptor,
)
from nanovllm.kernels.triton.common.launch import has_dependent_launch, launch
from nanovllm.kernels.triton.common.sizes import cdiv

CHUNK = 256  # keys
AT_ONCE = tl.constexpr(4)  # parts
FEW_QUERIES = 64  # of a step: with more there are programs enough


@dataclass(frozen=True)
class Parts:
    """What the programs that share a context leave: of each token, head and chunk, the output and two numbers.

    num_splits: programs that share one. arrived: of each KV head of a tile of queries, how many have left theirs; 0
    between layers.
    """

    num_splits: int
    outs: Tensor  # [num_tokens, num_heads, num_chunks, BLOCK_DIM] float32
    stats: Tensor  # [num_tokens, num_heads, num_chunks, 2] float32
    arrived: Tensor  # [num_tiles of queries, num_kv_heads] int32


@dataclass
class StepPlan:
    """The order of a step's queries and room for their parts, made by its first layer for those that follow."""

    queries: PrefillPlan | None = None
    parts: Parts | None = None


@triton.jit
def _add_part(top, norm, acc, part_top, part_norm, part_acc):
    """The softmax of one chunk more. What is rounded together is written so, not left to the compiler."""
    new_top = tl.maximum(top, part_top)
    decay, weight = tl.exp2(top - new_top), tl.exp2(part_top - new_top)
    norm = tl.fma(norm, decay, part_norm * weight)
    acc = tl.fma(acc, tl.broadcast_to(decay[:, None], acc.shape), part_acc * weight[:, None])
    return new_top, norm, acc


@triton.jit
def _add_up(
    outs_ptr, stats_ptr, sinks_ptr, out_ptr, token, head, num_chunks, first_chunk, end_chunk,
    GROUP: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """The parts of a token's heads, in order, AT_ONCE of them loaded together: what is not there changes no bit.

    Other multiprocessors wrote them: .cg reads past this one's L1 cache.
    """
    group = tl.arange(0, triton.next_power_of_2(GROUP))
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    query_head, is_head = head * GROUP + group, group < GROUP
    top, norm, acc = start_softmax(sinks_ptr, query_head, is_head, BLOCK_DIM)
    first_part = (token * NUM_HEADS + query_head) * num_chunks
    for begin in range(first_chunk, end_chunk, AT_ONCE):
        tops, norms, accs = (), (), ()
        for i in tl.static_range(AT_ONCE):
            part, mask = first_part + begin + i, is_head & (begin + i < end_chunk)
            tops = tops + (tl.load(stats_ptr + part * 2, mask=mask, other=LOWEST, cache_modifier=".cg"),)
            norms = norms + (tl.load(stats_ptr + part * 2 + 1, mask=mask, other=0.0, cache_modifier=".cg"),)
            out_place = part[:, None] * BLOCK_DIM + dim
            accs = accs + (tl.load(outs_ptr + out_place, mask=mask[:, None], other=0.0, cache_modifier=".cg"),)
        for i in tl.static_range(AT_ONCE):
            top, norm, acc = _add_part(top, norm, acc, tops[i], norms[i], accs[i])
    row_mask = is_head[:, None] & (dim < HEAD_DIM)
    store_rows(out_ptr, norm, acc, token, query_head, row_mask, NUM_HEADS, HEAD_DIM, BLOCK_DIM)


@triton.jit(
    do_not_specialize=["table_stride", "num_splits", "num_chunks"], do_not_specialize_on_alignment=["query_start_ptr"]
)
def _batch_invariant_attention_kernel(
    q_ptr,
    cache_ptr,
    pairs_ptr,
    cache_desc,
    sinks_ptr,
    out_ptr,
    query_start_ptr,
    seq_lens_ptr,
    table_ptr,
    order_ptr,
    outs_ptr,
    stats_ptr,
    arrived_ptr,
    num_splits,
    num_chunks,
    table_stride,
    q_stride_token,
    q_stride_head,
    cache_stride_kv,
    STRIDE_BLOCK: tl.constexpr,
    STRIDE_HEAD: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,  # tiles
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    DECODES: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    TOKENS: tl.constexpr = ROWS // GROUP
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    if PDL and not EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    split = 0
    program = tl.program_id(0)
    if outs_ptr is not None:
        split = program % num_splits
        program = program // num_splits
    head, place = program % NUM_KV_HEADS, program // NUM_KV_HEADS
    req = tl.load(order_ptr + place * 2)
    first_query = tl.load(order_ptr + place * 2 + 1)
    if req < 0:
        if PDL and EARLY:
            tl.extra.cuda.gdc_wait()  # rule 1 of launch.py
        return

    seq_len = tl.load(seq_lens_ptr + req)
    query_start = tl.load(query_start_ptr + req)
    query_len = tl.load(query_start_ptr + req + 1) - query_start
    if PDL and EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if PDL and cache_desc is not None:
        fence_tile_loads()
    q, token, query_head, row_mask = load_queries(
        q_ptr, query_start, query_len, first_query, head, q_stride_token, q_stride_head,
        GROUP, HEAD_DIM, BLOCK_DIM, ROWS,
    )  # fmt: skip
    row = tl.arange(0, ROWS)
    first_position = seq_len - query_len + first_query
    query_position = (first_position + row // GROUP)[:, None]
    end = tl.cdiv(tl.minimum(first_position + TOKENS, seq_len), TILE)
    table_ptr += req.to(tl.int64) * table_stride
    begin, whole_from, whole_to = 0, 0, tl.maximum(first_position + 1, 0) // TILE
    if WINDOW:
        begin = tl.maximum(first_position - WINDOW + 1, 0) // TILE
        whole_from = tl.cdiv(tl.maximum(first_position + TOKENS - WINDOW, 0), TILE)
    first_chunk, end_chunk = begin // CHUNK, tl.cdiv(end, CHUNK)
    sharers = 1
    if outs_ptr is not None:
        sharers = tl.maximum(tl.minimum(num_splits, end_chunk - first_chunk), 1)
        if split >= sharers:
            return

    top, norm, acc = start_softmax(sinks_ptr, query_head, row < TOKENS * GROUP, BLOCK_DIM)
    dim = tl.arange(0, BLOCK_DIM)
    first_part = (token * NUM_HEADS + query_head) * num_chunks
    is_row = tl.max(row_mask.to(tl.int32), axis=1) > 0
    for chunk in tl.range(first_chunk + split, end_chunk, sharers, num_stages=1):
        part_top, part_norm, part_acc = attend_keys(
            tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, BLOCK_DIM], tl.float32),
            q, cache_ptr, pairs_ptr, cache_desc, table_ptr, query_position,
            tl.maximum(chunk * CHUNK, begin), tl.minimum((chunk + 1) * CHUNK, end), whole_from, whole_to, seq_len, head,
            cache_stride_kv, STRIDE_BLOCK, STRIDE_HEAD, STRIDE_TOKEN, scale,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, NUM_STAGES, not DECODES,
        )  # fmt: skip
        if outs_ptr is None:
            top, norm, acc = _add_part(top, norm, acc, part_top, part_norm, part_acc)
        else:
            place_of_part = first_part + chunk
            out_place = place_of_part[:, None] * BLOCK_DIM + dim[None, :]
            tl.store(outs_ptr + out_place, part_acc, mask=is_row[:, None])
            tl.store(stats_ptr + place_of_part * 2, part_top, mask=is_row)
            tl.store(stats_ptr + place_of_part * 2 + 1, part_norm, mask=is_row)
    if outs_ptr is None:
        store_rows(out_ptr, norm, acc, token, query_head, row_mask, NUM_HEADS, HEAD_DIM, BLOCK_DIM)
    else:
        tl.debug_barrier()  # every warp's stores come before the one thread's release
        counter_ptr = arrived_ptr + place * NUM_KV_HEADS + head
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == sharers - 1:
            tl.store(counter_ptr, 0)
            for query in range(first_query, tl.minimum(first_query + TOKENS, query_len)):
                _add_up(
                    outs_ptr, stats_ptr, sinks_ptr, out_ptr, (query_start + query).to(tl.int64), head, num_chunks,
                    first_chunk, end_chunk, GROUP, NUM_HEADS, HEAD_DIM, BLOCK_DIM,
                )  # fmt: skip


def batch_invariant_attention_triton(
    q: Tensor, cache: LayerCache, meta: AttentionMetadata, shape: AttentionShape, plan: StepPlan | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `paged_attention.paged_attention_reference`. plan: of this step, whose layers differ in windows alone; all
    but the first read it before they wait (`launch.py`, rule 4).
    """
    plan = plan or StepPlan()
    is_settled = plan.queries is not None
    if plan.queries is None:
        config = prefill_config(q, cache.data, LONG_PROMPT)  # by the model alone
        plan.queries = plan_prefill(meta.query_start_loc, meta.seq_lens, 0, q, cache, config)
        plan.parts = _make_parts(q, cache, meta, shape, plan.queries)
    covered = sum(meta.query_lens_host)
    out = (torch.empty if covered == q.shape[0] else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
    config, parts, data, table = plan.queries.config, plan.parts, data_of(cache), meta.block_table
    num_splits = parts.num_splits if parts is not None else 1
    is_decodes = meta.max_query_len == 1
    descriptor = tile_descriptor(data, config.tile) if config.tile_loads and not is_decodes else None
    launch(
        _batch_invariant_attention_kernel, (plan.queries.order.shape[0] * shape.num_kv_heads * num_splits,), q.device,
        q, data, pairs_of(cache), descriptor, sinks,
        out, meta.query_start_loc, meta.seq_lens, table, plan.queries.order,
        *((parts.outs, parts.stats, parts.arrived) if parts is not None else (None, None, None)),
        num_splits, _num_chunks(cache, meta), table.stride(0), q.stride(0), q.stride(1), *data.stride()[:4],
        **layer_arguments(shape, cache.block_size), TILE=config.tile, CHUNK=max(1, CHUNK // config.tile),
        WINDOW=shape.window or 0, ROWS=rows_of_program(config, shape.num_heads // shape.num_kv_heads),
        DECODES=is_decodes, EARLY=is_settled and has_dependent_launch(q.device),
        **launch_options(config.num_stages, config.num_warps, config.occupancy),
    )  # fmt: skip
    return out


def _num_chunks(cache: LayerCache, meta: AttentionMetadata) -> int:
    """Of the longest context that the step's block table has room for."""
    return cdiv(meta.block_table.shape[1] * cache.block_size, CHUNK)


def _make_parts(
    q: Tensor, cache: LayerCache, meta: AttentionMetadata, shape: AttentionShape, queries: PrefillPlan
) -> Parts | None:
    """None where programs go through all chunks themselves: there are enough of them, or no second chunk."""
    num_tokens, num_chunks, num_tiles = q.shape[0], _num_chunks(cache, meta), queries.order.shape[0]
    room = 2 * num_multiprocessors(q.device) // (num_tiles * shape.num_kv_heads)
    num_splits = min(num_chunks, room)
    if num_tokens > FEW_QUERIES or num_splits < 2:
        return None
    size = num_tokens, shape.num_heads, num_chunks
    block_dim = layer_arguments(shape, cache.block_size)["BLOCK_DIM"]
    return Parts(
        num_splits,
        torch.empty((*size, int(block_dim)), dtype=torch.float32, device=q.device),
        torch.empty((*size, 2), dtype=torch.float32, device=q.device),
        torch.zeros((num_tiles, shape.num_kv_heads), dtype=torch.int32, device=q.device),
    )
