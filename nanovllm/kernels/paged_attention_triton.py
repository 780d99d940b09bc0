"""Triton twin of `paged_attention.py`: one kernel for decodes, one for everything longer.

Owns which of them computes which rows, and what the layers of a step share. Invariant: lengths and blocks are read on
the device, and every grid follows from sizes known on the host, so a call can be captured in a CUDA graph and replayed
with other lengths.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanovllm.kernels.paged_decode_triton import DecodePlan, decode_attention, plan_decode
from nanovllm.kernels.paged_prefill_triton import PrefillPlan, plan_prefill, prefill_attention

if TYPE_CHECKING:
    from nanovllm.kernels.paged_attention import PagedBatch


@dataclass
class StepPlans:
    """How one step's work is cut and ordered; the first layer that needs a plan makes it for those that follow."""

    decode: dict[int | None, DecodePlan] = field(default_factory=dict)  # by window
    prefill: PrefillPlan | None = None


def paged_attention_triton(
    q: Tensor,
    kv_cache: Tensor,
    meta: PagedBatch,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    plans: StepPlans | None = None,
) -> Tensor:
    """See `paged_attention.paged_attention_reference`; scale > 0. plans: of this step, whose layers have one shape.

    The last dimension of `q` and `kv_cache` is contiguous. Rows of q that belong to no request give zeros.
    """
    plans = plans or StepPlans()
    covered = meta.num_decodes + sum(meta.query_lens_host[meta.num_decodes :])
    out = (torch.empty if covered == q.shape[0] else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
    if meta.num_decodes:
        is_settled = window in plans.decode
        if not is_settled:
            plans.decode[window] = plan_decode(meta.seq_lens[: meta.num_decodes], q, kv_cache, window)
        decode_attention(
            q, kv_cache, out, meta.seq_lens, meta.block_table, plans.decode[window], scale, softcap, is_settled
        )
    if meta.num_reqs > meta.num_decodes:
        if plans.prefill is None:
            plans.prefill = plan_prefill(meta.query_start_loc, meta.seq_lens, meta.num_decodes, q, kv_cache)
        prefill_attention(
            q, kv_cache, out, meta.query_start_loc, meta.seq_lens, meta.block_table, plans.prefill, scale, window,
            softcap,
        )  # fmt: skip
    return out
