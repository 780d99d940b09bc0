"""Mixture-of-experts routing in Triton: one program chooses a token's experts, in registers.

Owns how tokens are routed on a GPU. Invariant: whatever the logits are, NaN too, the ids are those of experts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.routing import Routing
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import next_power_of_2


@triton.jit
def choose_experts(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr,
    GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr,
    TOP_GROUPS: tl.constexpr, GROUP_JUDGES: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr,
    SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, LEAST_SUM: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """One token's: its TOP_K weights and ids, from its logits, which other multiprocessors may just have written: .cg
    reads past this one's L1 cache."""
    place: tl.constexpr = GROUPS_PADDED * SIZE_PADDED
    slot = tl.arange(0, place)  # of an expert, or of none: groups are padded
    expert = slot // SIZE_PADDED * SIZE + slot % SIZE_PADDED
    is_expert = (slot // SIZE_PADDED < GROUPS) & (slot % SIZE_PADDED < SIZE)
    logits = tl.load(logits_ptr + expert, mask=is_expert, other=-float("inf"), cache_modifier=".cg").to(tl.float32)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        values = tl.exp(logits - tl.max(logits, axis=0))
        scores = values / tl.sum(values, axis=0)
    compared = scores
    if bias_ptr is not None:
        compared += tl.load(bias_ptr + expert, mask=is_expert, other=0.0)
    left = tl.where(is_expert, compared, -float("inf"))
    if TOP_GROUPS < GROUPS:
        by_group = tl.reshape(left, [GROUPS_PADDED, SIZE_PADDED])
        totals, index = tl.max(by_group, axis=1, return_indices=True)
        if GROUP_JUDGES == 2:
            is_best = tl.arange(0, SIZE_PADDED)[None, :] == index[:, None]
            totals += tl.max(tl.where(is_best, -float("inf"), by_group), axis=1)
        group = tl.arange(0, GROUPS_PADDED)
        totals = tl.where(group < GROUPS, totals, -float("inf"))
        is_kept = group < 0
        for _ in tl.static_range(TOP_GROUPS):
            _best, index = tl.max(totals, axis=0, return_indices=True)
            is_kept = is_kept | (group == index)
            totals = tl.where(group == index, -float("inf"), totals)
        left = tl.reshape(tl.where(is_kept[:, None], by_group, -float("inf")), [place])
    choice = tl.arange(0, TOP_K_PADDED)
    weights = tl.zeros([TOP_K_PADDED], tl.float32)
    ids = tl.zeros([TOP_K_PADDED], tl.int32)
    for i in tl.static_range(TOP_K):
        _best, index = tl.max(left, axis=0, return_indices=True)
        score = tl.sum(tl.where(slot == index, scores, 0.0), axis=0)
        # NaN compares with nothing: still an expert's.
        id = tl.minimum(index // SIZE_PADDED * SIZE + index % SIZE_PADDED, GROUPS * SIZE - 1)
        weights = tl.where(choice == i, score, weights)
        ids = tl.where(choice == i, id, ids)
        left = tl.where(slot == index, -float("inf"), left)
    if RENORMALIZE:
        weights = weights / tl.maximum(tl.sum(weights, axis=0), LEAST_SUM)
    tl.store(weights_ptr + choice, weights * SCALE, mask=choice < TOP_K)
    tl.store(ids_ptr + choice, ids, mask=choice < TOP_K)


@triton.jit
def _route_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    logits_stride,
    GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_JUDGES: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    LEAST_SUM: tl.constexpr,
    SCALE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    choose_experts(
        logits_ptr + token * logits_stride, bias_ptr, weights_ptr + token * TOP_K, ids_ptr + token * TOP_K,
        GROUPS, GROUPS_PADDED, SIZE, SIZE_PADDED, TOP_GROUPS, GROUP_JUDGES, TOP_K, TOP_K_PADDED,
        SIGMOID, RENORMALIZE, LEAST_SUM, SCALE,
    )  # fmt: skip


def route_triton(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """See `routing.route`."""
    num_tokens, num_experts = logits.shape
    weights = torch.empty((num_tokens, routing.top_k), dtype=torch.float32, device=logits.device)
    expert_ids = torch.empty((num_tokens, routing.top_k), dtype=torch.int32, device=logits.device)
    if num_tokens:
        launch(
            _route_kernel, (num_tokens,), logits.device,
            logits, bias, weights, expert_ids, logits.stride(0), **routing_arguments(routing, num_experts), num_warps=1,
        )  # fmt: skip
    return weights, expert_ids


def routing_arguments(routing: Routing, num_experts: int) -> dict[str, Any]:
    """The constants of `choose_experts`."""
    # Where all groups are kept, they are one.
    groups = routing.num_groups if routing.top_groups < routing.num_groups else 1
    size = num_experts // groups
    return {
        "GROUPS": groups,
        "GROUPS_PADDED": next_power_of_2(groups),
        "SIZE": size,
        "SIZE_PADDED": next_power_of_2(size),
        "TOP_GROUPS": routing.top_groups if groups > 1 else 1,
        "GROUP_JUDGES": routing.group_judges,
        "TOP_K": routing.top_k,
        "TOP_K_PADDED": next_power_of_2(routing.top_k),
        "SIGMOID": routing.scores == "sigmoid",
        "RENORMALIZE": routing.renormalize,
        "LEAST_SUM": routing.least_sum,
        "SCALE": routing.scale,
    }
