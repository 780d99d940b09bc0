"""Batch-invariant attention in Triton: the prefill kernel for every token, decodes among them.

Owns the choice. Invariant: a token's output depends on its query and its context alone, to the bit. A row of the kernel
meets the keys in one order, in tiles that begin at the first token of all, and nothing is split. Other rows of its tile
of queries may need tiles of which it sees nothing: their weights are 0 and what was before decays by 1, which changes
no bit.
"""

import torch
from torch import Tensor

from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.triton.attention.paged_attention import StepPlans
from nanovllm.kernels.triton.attention.prefill import LONG_PROMPT, plan_prefill, prefill_attention, prefill_config


def batch_invariant_attention_triton(
    q: Tensor, cache: LayerCache, meta: AttentionMetadata, shape: AttentionShape, plans: StepPlans | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `paged_attention.paged_attention_reference`. plans: as of `paged_attention_triton`."""
    plans = plans or StepPlans()
    if False not in plans.prefill:
        config = prefill_config(q, cache.data, LONG_PROMPT)  # by the model alone
        plans.prefill[False] = plan_prefill(meta.query_start_loc, meta.seq_lens, 0, q, cache, config)
    covered = sum(meta.query_lens_host)
    out = (torch.empty if covered == q.shape[0] else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
    prefill_attention(q, cache, out, meta, plans.prefill[False], shape, sinks)
    return out
