"""Paged attention in Triton: the choice between the decode, the fused decode, the prefill and Hopper's prefill kernel.

Owns which of them computes which rows, and what the layers of a step share. Invariant: lengths and blocks are read on
the device, and every grid follows from sizes known on the host, so a call can be captured in a CUDA graph and replayed
with other lengths.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, HeadInputs, LayerCache
from nanovllm.kernels.triton.attention.decode import decode_attention
from nanovllm.kernels.triton.attention.decode_plan import FEW_REQUESTS, DecodePlan, plan_decode
from nanovllm.kernels.triton.attention.fused_decode import fused_decode
from nanovllm.kernels.triton.attention.prefill import PrefillPlan, plan_prefill, prefill_attention
from nanovllm.kernels.triton.common.device_limits import has_hopper_gluon


@dataclass
class StepPlans:
    """How one step's work is cut and ordered; the first layer that needs a plan makes it for those that follow, which
    read it before they wait (`launch.py`, rule 4)."""

    decode: dict[int | None, DecodePlan] = field(default_factory=dict)  # by window
    prefill: dict[bool, PrefillPlan] = field(default_factory=dict)  # by: is it for Hopper's own kernel?


def paged_attention_triton(
    q: Tensor, cache: LayerCache, meta: AttentionMetadata, shape: AttentionShape, plans: StepPlans | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `paged_attention.paged_attention_reference`. plans: of this step, whose layers differ in windows alone.

    The last dimension of `q` and of the cache is contiguous. Rows of q that belong to no request give zeros.
    """
    plans = plans or StepPlans()
    covered = meta.num_decodes + sum(meta.query_lens_host[meta.num_decodes :])
    out = (torch.empty if covered == q.shape[0] else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
    if meta.num_decodes:
        plan, is_settled = _decode_plan(plans, meta, out, cache, shape.window)
        decode_attention(q, cache, out, meta, plan, shape, sinks, is_settled)
    if meta.num_reqs > meta.num_decodes:
        _attend_prompts(q, cache, out, meta, shape, plans, sinks)
    return out


def _attend_prompts(
    q: Tensor, cache: LayerCache, out: Tensor, meta: AttentionMetadata, shape: AttentionShape, plans: StepPlans,
    sinks: Tensor | None,
) -> None:  # fmt: skip
    attend, config, is_for_hopper = prefill_attention, None, False
    if has_hopper_gluon(q.device):
        from nanovllm.kernels.triton.attention import prefill_hopper

        mean_query_len = (q.shape[0] - meta.num_decodes) // (meta.num_reqs - meta.num_decodes)
        is_for_hopper = prefill_hopper.is_for_hopper(cache, shape, mean_query_len)
        if is_for_hopper:
            attend, config = prefill_hopper.prefill_attention_hopper, prefill_hopper.CONFIG
    if is_for_hopper not in plans.prefill:
        plans.prefill[is_for_hopper] = plan_prefill(
            meta.query_start_loc, meta.seq_lens, meta.num_decodes, q, cache, config
        )
    attend(q, cache, out, meta, plans.prefill[is_for_hopper], shape, sinks)


def _decode_plan(
    plans: StepPlans, meta: AttentionMetadata, out: Tensor, cache: LayerCache, window: int | None
) -> tuple[DecodePlan, bool]:
    """The plan, and whether a layer before this one made it."""
    is_settled = window in plans.decode
    if not is_settled:
        cascade = meta.cascade if window is None else None
        plans.decode[window] = plan_decode(
            meta.seq_lens[: meta.num_decodes], meta.block_table, out, cache, window, cascade=cascade
        )
    return plans.decode[window], is_settled


def takes_qkv(meta: AttentionMetadata, window: int | None) -> bool:
    """May `decode_qkv_triton` be called for this step? It is for a few decodes that share nothing, and nothing else."""
    shares = meta.cascade is not None or meta.reads_step
    return not shares and meta.num_decodes == meta.num_reqs <= FEW_REQUESTS and window != 1


def decode_qkv_triton(
    qkv: Tensor,
    heads: HeadInputs,
    cache: LayerCache,
    meta: AttentionMetadata,
    shape: AttentionShape,
    plans: StepPlans,
    sinks: Tensor | None = None,
) -> Tensor:
    """`qkv_rope_store.qkv_rope_store`, then `paged_attention_triton`, in one kernel; where `takes_qkv` says so.

    qkv [n, (num_heads + 2 num_kv_heads) * head_dim] of n decodes -> [n, num_heads, head_dim].
    """
    out = torch.empty((qkv.shape[0], shape.num_heads, shape.head_dim), dtype=qkv.dtype, device=qkv.device)
    plan, is_settled = _decode_plan(plans, meta, out, cache, shape.window)
    fused_decode(qkv, heads, cache, out, meta, plan, shape, sinks, is_settled)
    return out
