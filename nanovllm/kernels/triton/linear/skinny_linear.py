"""Skinny linear in Triton: the choice between GEMV, skinny GEMM and cuBLAS.

Owns how few rows are multiplied on a GPU. A decode step reads every weight once and computes little, so what counts is
that the reading never pauses, not even from one kernel to the next: each program asks for its weights before it waits
for the kernel ahead (`launch.py`). Invariant: sums are added in an order that the sizes alone determine.

    rows      kernel           product
    1         skinny_gemv.py   multiply and add, a lane along the inputs; of long inputs, 2 rows as well
    2 .. 8    skinny_gemm.py   matrix unit, warps split the inputs
    9 .. 64   skinny_gemm.py   matrix unit, for smaller matrices: short inputs are held, programs split others

The norm needs all of a row before its first product; every program computes it, from rows that are few enough to hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels.triton.common.device_limits import has_large_shared_memory
from nanovllm.kernels.triton.common.sizes import cdiv
from nanovllm.kernels.triton.linear.skinny_gemm import GemmConfig, launch_gemm
from nanovllm.kernels.triton.linear.skinny_gemv import GemvConfig, launch_gemv

MAX_ROWS = 64
MAX_SPLITS = 12
MAX_WEIGHTS = 6 * 2**20  # for 9 to 64 rows
MAX_HELD_INPUTS = 1024
MAX_OUTPUTS = 65536  # for more than one row: a wider head is at the memory's speed there anyway

Config = GemvConfig | GemmConfig

# 2 to 8 rows, by gated: up to how many inputs, and the kernel whose warps split them.
SLICED: dict[bool, list[tuple[int, GemmConfig]]] = {
    False: [
        (1024, GemmConfig(outputs=16, num_warps=4, slices=4, chunk=256, ahead=4, x_ahead=4)),
        (2048, GemmConfig(outputs=16, num_warps=4, slices=4, chunk=1024, ahead=2, x_ahead=2)),
        (3072, GemmConfig(outputs=16, num_warps=4, slices=4, chunk=1024, ahead=3, x_ahead=3)),
        (4096, GemmConfig(outputs=16, num_warps=8, slices=8, chunk=512, ahead=4, x_ahead=2)),
    ],
    True: [
        (1024, GemmConfig(outputs=16, num_warps=4, slices=4, chunk=512, ahead=2, x_ahead=2)),
        (2048, GemmConfig(outputs=16, num_warps=8, slices=8, chunk=1024, ahead=1, x_ahead=1)),
        (3072, GemmConfig(outputs=16, num_warps=8, slices=8, chunk=512, ahead=3, x_ahead=1)),
    ],
}


# 9 to 64 rows, by gated and fewer than 2,048 inputs: up to how many rows, and the inputs of a program; the same where
# shared memory is small. Larger matrices keep every multiprocessor busy as they are, and so do short inputs the more
# rows there are.
SPANS: dict[tuple[bool, bool], list[tuple[int, int, int]]] = {
    (False, True): [(16, 256, 256)],
    (False, False): [(64, 512, 512)],
    (True, True): [(16, 512, 256), (32, 256, 256)],
    (True, False): [(64, 512, 256)],
}


def choose(x: Tensor, weight: Tensor, gated: bool = False, normed: bool = False) -> Config | None:
    """The kernel for x [num_rows, in_features] and weight [out_features, in_features]; None: leave it to cuBLAS.

    Looks at sizes, strides, dtypes and alignment only; any of them that no kernel is made for goes to cuBLAS, too.
    """
    num_rows, num_inputs = x.shape
    num_outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    if (
        not 0 < num_rows <= MAX_ROWS
        or x.dtype not in (torch.float16, torch.bfloat16)
        or weight.dtype != x.dtype
        or num_outputs % 16
        or num_inputs % 16
        or x.stride(1) != 1
        or not weight.is_contiguous()
        or weight.data_ptr() % 16
        or (weight.shape[0] > MAX_OUTPUTS and num_rows > 1)
        or weight.numel() >= 2**31
    ):
        return None
    is_roomy = has_large_shared_memory(x.device)
    return choose_by_size(num_rows, num_outputs, num_inputs, gated, normed, is_roomy)


def choose_by_size(
    num_rows: int, num_outputs: int, num_inputs: int, gated: bool, normed: bool, is_roomy: bool = True
) -> Config | None:
    """See `choose`; num_outputs counts what comes out, so half the weight's rows if gated. is_roomy: the answer of
    `has_large_shared_memory`.

    The rules are what sweeps over the layers of a 0.6B and an 8B model on an H200 and an H100 found fastest, in a whole
    step: what a program holds in registers keeps the programs of the next kernel waiting. The norm is worth repeating
    in every program only while rows are short and few: at 4,096 inputs, or for more than 8 rows, a kernel of its own is
    faster.
    """
    if normed and num_inputs > (2048 if num_rows == 1 else 1024):
        return None
    if num_rows == 1 and num_inputs > 4096:
        return GemvConfig(outputs=4, num_warps=8, ahead=2, chunk=2048)
    if num_rows == 1 or (num_rows == 2 and 3072 < num_inputs <= 4096):
        return _gemv_config(num_rows, num_outputs, num_inputs, 2 if gated else 1)
    if num_rows <= 8:
        return next((config for most, config in SLICED[gated] if num_inputs <= most), None)
    if normed or num_outputs * num_inputs * (2 if gated else 1) > MAX_WEIGHTS:
        return None
    if num_inputs <= MAX_HELD_INPUTS and is_roomy:
        # All of a program's weights are in shared memory before it waits.
        return GemmConfig(outputs=64, num_warps=4, slices=1, chunk=256, ahead=MAX_HELD_INPUTS // 256, x_ahead=1)
    return _split_config(num_rows, num_inputs, gated, is_roomy)


def _gemv_config(num_rows: int, num_outputs: int, num_inputs: int, planes: int) -> GemvConfig:
    chunks = cdiv(num_inputs, 256)
    # As many outputs per warp as there are registers for their weights, as long as all multiprocessors have work.
    loads = 16 if num_rows == 1 else 8
    per_warp = 1
    while per_warp * 2 * chunks * planes <= loads and num_outputs // (per_warp * 2 * 4) >= 256:
        per_warp *= 2
    # One row leaves registers for twice as many weights: 4.27 ms a step of the 8B shape in place of 4.55.
    ahead = 16 // per_warp if num_rows == 1 else 16 // (per_warp * planes)
    return GemvConfig(outputs=4 * per_warp, num_warps=4, ahead=ahead)


def _split_config(num_rows: int, num_inputs: int, gated: bool, is_roomy: bool) -> GemmConfig | None:
    """Programs split the inputs, a chunk for each, so that all weights are on their way at once; inputs that cannot be
    split into equal chunks are left alone."""
    spans = SPANS[gated, num_inputs < 2048]
    span = next((roomy if is_roomy else small for most, roomy, small in spans if num_rows <= most), None)
    if span is None:
        return None
    fewest = cdiv(num_inputs, span)
    splits = next((n for n in range(fewest, MAX_SPLITS + 1) if num_inputs % (16 * n) == 0), None)
    if splits is None:
        return None
    num_warps = 4 if span == 256 and not gated else 8
    return GemmConfig(outputs=64, num_warps=num_warps, slices=1, chunk=span, ahead=1, x_ahead=1, splits=splits)


def skinny_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: Config,
    gated: bool = False,
    gelu: bool = False,
    semaphores: Tensor | None = None,
) -> Tensor:
    """`skinny_linear.skinny_linear`, or `gated_linear` if gated, in the kernel of `config`, which `choose` gave.

    semaphores: `new_semaphores`'s; without it a config with splits makes and clears some, a kernel more.
    """
    out = torch.empty((x.shape[0], weight.shape[0] // (2 if gated else 1)), dtype=x.dtype, device=x.device)
    _launch(x, None, None, 0.0, weight, bias, out, None, config, gated, gelu, semaphores)
    return out


def rms_norm_linear_triton(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    config: Config,
    gated: bool = False,
    gelu: bool = False,
    semaphores: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`skinny_linear.rms_norm_linear`, or `rms_norm_gated_linear` if gated."""
    out = torch.empty((x.shape[0], weight.shape[0] // (2 if gated else 1)), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, residual, norm_weight, eps, weight, bias, out, total, config, gated, gelu, semaphores)
    return out, total


def _launch(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    total: Tensor | None,
    config: Config,
    gated: bool,
    gelu: bool,
    semaphores: Tensor | None,
) -> None:
    given = (x, residual, norm_weight, eps, weight, bias, out, total)
    if isinstance(config, GemmConfig):
        launch_gemm(*given, config, gated, gelu, semaphores)
    else:
        launch_gemv(*given, config, gated, gelu)
