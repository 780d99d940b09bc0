"""The router in Triton: residual addition, norm, product and choice of one token's experts, in one kernel.

Owns that kernel. What it reads is little, so all that counts is how long one thing waits for another: a program is a
warp, which has its rows of the matrix before the kernel ahead ends; each repeats the norm; and the last one to write
its logits chooses. Invariant: bits do not depend on which program is the last.
"""

# Tuples of tiles grow while a kernel is compiled.
# mypy: disable-error-code="assignment, misc, var-annotated, no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.router import Router
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv
from nanovllm.kernels.triton.linear.parts import add_residual, load_chunk, normalize
from nanovllm.kernels.triton.routing import choose_experts, routing_arguments

MAX_BYTES = 10240  # of a row of the matrix: what a warp can hold, beside the norm
MANY = 128  # experts, from which on a program has two


@triton.jit
def _router_kernel(
    x_ptr,
    residual_ptr,
    norm_weight_ptr,
    weight_ptr,
    bias_ptr,
    correction_ptr,
    normed_ptr,
    total_ptr,
    logits_ptr,
    semaphores_ptr,
    weights_ptr,
    ids_ptr,
    eps,
    INPUTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHUNK: tl.constexpr,
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
    CHUNKS: tl.constexpr = (INPUTS + CHUNK - 1) // CHUNK
    program = tl.program_id(0)
    expert = program * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.minimum(expert, EXPERTS - 1)
    place, col = row[:, None] * INPUTS, tl.arange(0, CHUNK)[None, :]
    one = tl.zeros([1, 1], tl.int32)
    weights, norm_weights, totals = (), (), ()
    for i in tl.static_range(CHUNKS):
        weights = weights + (load_chunk(weight_ptr, place, col, i, INPUTS, CHUNK),)
        norm_weights = norm_weights + (load_chunk(norm_weight_ptr, one, col, i, INPUTS, CHUNK),)
    if PDL:
        tl.extra.cuda.gdc_wait()
    squares = tl.zeros([1, CHUNK], tl.float32)
    for i in tl.static_range(CHUNKS):
        residual = load_chunk(residual_ptr, one, col, i, INPUTS, CHUNK)
        total = add_residual(load_chunk(x_ptr, one, col, i, INPUTS, CHUNK), residual)
        squares += total.to(tl.float32) * total.to(tl.float32)
        totals = totals + (total,)
    scale = tl.rsqrt(tl.sum(squares, axis=1) / INPUTS + eps)[:, None]
    sums = tl.zeros([OUTPUTS, CHUNK], tl.float32)
    for i in tl.static_range(CHUNKS):
        normed = normalize(totals[i], scale, norm_weights[i])
        sums += weights[i].to(tl.float32) * normed.to(tl.float32)
        mask = (col < INPUTS - i * CHUNK) & (program == 0)
        tl.store(normed_ptr + one + i * CHUNK + col, normed, mask=mask)
        tl.store(total_ptr + one + i * CHUNK + col, totals[i], mask=mask)
    logits = tl.sum(sums, axis=1)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + row).to(tl.float32)
    tl.store(logits_ptr + expert, logits.to(logits_ptr.dtype.element_ty), mask=expert < EXPERTS)
    tl.debug_barrier()  # every lane's store comes before the one lane's release
    if tl.atomic_add(semaphores_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(semaphores_ptr, 0)
        choose_experts(
            logits_ptr, correction_ptr, weights_ptr, ids_ptr,
            GROUPS, GROUPS_PADDED, SIZE, SIZE_PADDED, TOP_GROUPS, GROUP_JUDGES, TOP_K, TOP_K_PADDED,
            SIGMOID, RENORMALIZE, LEAST_SUM, SCALE,
        )  # fmt: skip


def takes(x: Tensor, router: Router) -> bool:
    """By sizes and dtypes alone."""
    weight = router.weight
    return (
        x.shape[0] == 1
        and x.dtype in (torch.float16, torch.bfloat16)
        and weight.dtype in (x.dtype, torch.float32)
        and weight.is_contiguous()
        and weight.shape[1] * weight.element_size() <= MAX_BYTES
    )


def rms_norm_route_triton(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, router: Router, semaphores: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `router.rms_norm_route`, of one row. semaphores: the first one is used."""
    num_experts, hidden_size = router.weight.shape
    normed, total = torch.empty_like(x), torch.empty_like(x)
    logits = torch.empty(num_experts, dtype=router.weight.dtype, device=x.device)
    weights = torch.empty((1, router.routing.top_k), dtype=torch.float32, device=x.device)
    expert_ids = torch.empty((1, router.routing.top_k), dtype=torch.int32, device=x.device)
    outputs = 1 if num_experts < MANY or router.weight.dtype == torch.float32 else 2
    launch(
        _router_kernel, (cdiv(num_experts, outputs),), x.device,
        x, residual, norm_weight, router.weight, router.bias, router.correction,
        normed, total, logits, semaphores, weights, expert_ids, eps,
        INPUTS=hidden_size, EXPERTS=num_experts, OUTPUTS=outputs, CHUNK=256,
        **routing_arguments(router.routing, num_experts), num_warps=1,
    )  # fmt: skip
    return normed, total, weights, expert_ids
