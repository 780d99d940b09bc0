"""Attention over latents in Triton (MLA; DeepSeek-AI, 2024): the choice between decode and prefill kernel.

Owns which of them computes which rows, and what the layers of a step share. Invariant: as in `paged_attention.py`: a
call can be captured in a CUDA graph and replayed with other lengths.
"""

from dataclasses import dataclass

from torch import Tensor

from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.triton.attention.latent_decode import LatentDecodePlan, latent_decode, plan_latent_decode
from nanovllm.kernels.triton.attention.latent_prefill import LatentPrefillPlan, latent_prefill, plan_latent_prefill
from nanovllm.kernels.triton.attention.prefill import PrefillPlan


@dataclass
class LatentPlans:
    """How one step's work is cut and ordered; the first layer makes it for those that follow."""

    decode: LatentDecodePlan | None = None
    prefill: LatentPrefillPlan | None = None
    whole: PrefillPlan | None = None


def latent_attention_triton(
    q: Tensor,
    cache: LayerCache,
    meta: AttentionMetadata,
    shape: AttentionShape,
    plans: LatentPlans,
    is_exact: bool = False,
) -> Tensor:
    """See `kernels.paged_attention.paged_attention_reference`, with a value_dim. Rows of q that belong to no request
    give zeros.

    is_exact: the prefill kernel for every token, decodes among them: a row of it meets the keys in one order, and
    nothing is split, so it has the same bits in any batch.
    """
    num_decodes = 0 if is_exact else meta.num_decodes
    covered = num_decodes + sum(meta.query_lens_host[num_decodes:])
    size = *q.shape[:2], shape.value_dim
    out = (q.new_empty if covered == q.shape[0] else q.new_zeros)(size)
    if num_decodes:
        plan, is_settled = decode_plan(plans, meta, out, cache)
        latent_decode(q, cache, out, meta, plan, shape, is_settled)
    if meta.num_reqs > num_decodes:
        if plans.prefill is None:
            plans.prefill = plan_latent_prefill(meta, q, cache, num_decodes)
        latent_prefill(q, cache, out, meta, plans.prefill, shape)
    return out


def decode_plan(
    plans: LatentPlans, meta: AttentionMetadata, out: Tensor, cache: LayerCache
) -> tuple[LatentDecodePlan, bool]:
    """The plan, and whether a layer before this one made it. out: as in `plan_latent_decode`."""
    is_settled = plans.decode is not None
    if plans.decode is None:
        plans.decode = plan_latent_decode(meta, out, cache)
    return plans.decode, is_settled
