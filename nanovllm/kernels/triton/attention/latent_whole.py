"""Attention of whole prompts over latents in Triton, with the keys and values that they stand for.

Owns the kernel for requests whose context is in this step from its first token on; the order of the tiles of queries is
`prefill.py`'s. Invariant: equals `latent_prefill.py` up to rounding.

`attention/latent.py` says what they are for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention_types import AttentionMetadata, LayerCache
from nanovllm.kernels.triton.attention.prefill import PrefillConfig, PrefillPlan, plan_prefill
from nanovllm.kernels.triton.attention.tiles import LOG2_E, LOWEST, launch_options, update_softmax
from nanovllm.kernels.triton.common.device_limits import has_large_shared_memory, has_largest_shared_memory
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import next_power_of_2


def whole_config(head_dim: int, dtype: torch.dtype, device: torch.device) -> PrefillConfig:
    if dtype == torch.float32:
        return PrefillConfig(rows=32, tile=16, num_stages=1, occupancy=1)
    if not has_large_shared_memory(device):
        return PrefillConfig(rows=64, tile=32, num_stages=1, num_warps=4, occupancy=1)
    if head_dim > 128:
        rows = 128 if has_largest_shared_memory(device) else 64  # 412 TFLOP/s in the place of 205, of 192 + 64 and 256
        return PrefillConfig(rows, tile=64, num_stages=2, num_warps=8, occupancy=1)
    return PrefillConfig(rows=128, tile=64, num_stages=3, num_warps=8, occupancy=1)


def plan_whole(meta: AttentionMetadata, q: Tensor, config: PrefillConfig | None = None) -> PrefillPlan:
    """Plans the prompts of a step, all of them whole. q: as of `attend_whole`; only sizes, dtype and device count."""
    config = config or whole_config(q.shape[2], q.dtype, q.device)
    of_heads = LayerCache(q.new_empty(1).expand(1, 1, q.shape[1], 1, 1))  # a head is a program's own
    first = meta.num_decodes
    return plan_prefill(meta.query_start_loc[first:] - first, meta.seq_lens[first:], 0, q, of_heads, config)


@triton.jit
def _attend_whole(
    top, norm, acc, q, q_rope, kv_ptr, rope_ptr, query, begin, end, query_len, kv_stride, rope_stride, scale,
    KEY: tl.constexpr, BLOCK_KEY: tl.constexpr, ROPE: tl.constexpr, BLOCK_ROPE: tl.constexpr, VALUE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, TILE: tl.constexpr, IS_MASKED: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """The online softmax over tiles begin .. end. IS_MASKED: queries may not see all of them, nor may all be there."""
    key, rope, value = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_ROPE), tl.arange(0, BLOCK_VALUE)
    for t in tl.range(begin, end, num_stages=NUM_STAGES):
        token = t * TILE + tl.arange(0, TILE)
        row = token.to(tl.int64)[:, None]
        is_token = (token < query_len)[:, None] | (not IS_MASKED)
        k = tl.load(kv_ptr + row * kv_stride + key[None, :], mask=is_token & (key < KEY)[None, :], other=0.0)
        k_rope = tl.load(
            rope_ptr + row * rope_stride + rope[None, :], mask=is_token & (rope < ROPE)[None, :], other=0.0
        )
        v_ptr = kv_ptr + row * kv_stride + KEY + value[None, :]
        v = tl.load(v_ptr, mask=is_token & (value < VALUE)[None, :], other=0.0)
        scores = tl.dot(q_rope, tl.trans(k_rope), input_precision="ieee")
        scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
        if IS_MASKED:
            scores = tl.where(token[None, :] <= query[:, None], scores, float("-inf"))
        top, norm, acc = update_softmax(top, norm, acc, scores, v, None, scale, 0.0)
    return top, norm, acc


@triton.jit(do_not_specialize_on_alignment=["query_start_ptr"])
def _whole_prompts_kernel(
    q_ptr,
    q_rope_ptr,
    kv_ptr,
    rope_ptr,
    out_ptr,
    query_start_ptr,
    order_ptr,
    q_stride_token,
    q_stride_head,
    q_rope_stride_token,
    q_rope_stride_head,
    kv_stride_token,
    rope_stride_token,
    scale,
    HEADS: tl.constexpr,
    KEY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    head, place = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    req = tl.load(order_ptr + place * 2)
    first = tl.load(order_ptr + place * 2 + 1)
    if req < 0:
        return
    start = tl.load(query_start_ptr + req)
    query_len = tl.load(query_start_ptr + req + 1) - start
    query = first + tl.arange(0, ROWS)
    is_query = (query < query_len)[:, None]
    token = (start + query).to(tl.int64)[:, None]
    key, rope, value = tl.arange(0, BLOCK_KEY)[None, :], tl.arange(0, BLOCK_ROPE)[None, :], tl.arange(0, BLOCK_VALUE)
    q_row = q_ptr + token * q_stride_token + head * q_stride_head + key
    q = tl.load(q_row, mask=is_query & (key < KEY), other=0.0)
    rope_row = q_rope_ptr + token * q_rope_stride_token + head * q_rope_stride_head + rope
    q_rope = tl.load(rope_row, mask=is_query & (rope < ROPE), other=0.0)
    kv_ptr += start.to(tl.int64) * kv_stride_token + head * (KEY + VALUE)
    rope_ptr += start.to(tl.int64) * rope_stride_token

    top = tl.full([ROWS], LOWEST, tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_VALUE], tl.float32)
    masked_from = first // TILE
    top, norm, acc = _attend_whole(
        top, norm, acc, q, q_rope, kv_ptr, rope_ptr, query, 0, masked_from, query_len, kv_stride_token,
        rope_stride_token, scale, KEY, BLOCK_KEY, ROPE, BLOCK_ROPE, VALUE, BLOCK_VALUE, TILE, False, NUM_STAGES,
    )  # fmt: skip
    end = tl.cdiv(tl.minimum(first + ROWS, query_len), TILE)
    top, norm, acc = _attend_whole(
        top, norm, acc, q, q_rope, kv_ptr, rope_ptr, query, masked_from, end, query_len, kv_stride_token,
        rope_stride_token, scale, KEY, BLOCK_KEY, ROPE, BLOCK_ROPE, VALUE, BLOCK_VALUE, TILE, True, 1,
    )  # fmt: skip
    result = acc / tl.where(norm > 0, norm, 1.0)[:, None]
    out_row = out_ptr + (token * HEADS + head) * VALUE + value[None, :]
    tl.store(out_row, result.to(out_ptr.dtype.element_ty), mask=is_query & (value < VALUE))


def attend_whole(
    q: Tensor, q_rope: Tensor, kv: Tensor, k_rope: Tensor, scale: float, meta: AttentionMetadata, plan: PrefillPlan
) -> Tensor:
    """See `LatentBackend.forward_whole`. These are the tokens behind the step's decodes; a request's are all that it
    has. Rows of tokens may lie apart; rows of none give zeros.
    """
    (num_tokens, num_heads, key_dim), rope_dim, config = q.shape, q_rope.shape[2], plan.config
    value_dim = kv.shape[2] - key_dim
    new = q.new_empty if sum(meta.query_lens_host[meta.num_decodes :]) == num_tokens else q.new_zeros
    starts = meta.query_start_loc[meta.num_decodes :] - meta.num_decodes
    out = new(num_tokens, num_heads, value_dim)
    launch(
        _whole_prompts_kernel, (plan.order.shape[0] * num_heads,), q.device,
        q, q_rope, kv, k_rope, out, starts, plan.order, q.stride(0), q.stride(1), q_rope.stride(0),
        q_rope.stride(1), kv.stride(0), k_rope.stride(0), scale * LOG2_E, HEADS=num_heads, KEY=key_dim,
        BLOCK_KEY=max(16, next_power_of_2(key_dim)), ROPE=rope_dim, BLOCK_ROPE=max(16, next_power_of_2(rope_dim)),
        VALUE=value_dim, BLOCK_VALUE=max(16, next_power_of_2(value_dim)), ROWS=config.rows, TILE=config.tile,
        **launch_options(config.num_stages, config.num_warps, config.occupancy),
    )  # fmt: skip
    return out
