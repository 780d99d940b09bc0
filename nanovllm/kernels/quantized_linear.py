"""Weight-only quantized products: x W^T with W in 4 or 8 bits, and inputs rounded to 8 bits where a format says so.

Owns what the numbers mean; the formats of checkpoints are `quantization/`'s. Invariant: W = (codes - zero) * scale, or
bits * scale + low, up to rounding to the dtype of x.

    codes    int4   [outputs, inputs / 2] uint8: inputs i and i + 16 of 32 in a byte, the latter in its upper half, 8
                    added to each
             e2m1   likewise, without an addition: sign, two bits of exponent, one of mantissa
             int8   [outputs, inputs] int8
             fp8    [outputs, inputs] float8_e4m3fn
    bits            the codes as they lie there, of int4 without taking 8 off
    scale, zero, low    [outputs, groups]: of `group_size` consecutive inputs, the last group what is left; beside
                        e2m1, of MXFP4 (Rouhani et al., 2023), scales are e8m0 in uint8, powers of 2, and no others are
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.cpu.cpu_kernels import load_cpu_kernels
from nanovllm.kernels.cpu.rounded_product import RoundedProduct
from nanovllm.kernels.dispatch import use_triton
from nanovllm.kernels.rms_norm import add_rms_norm, rms_norm
from nanovllm.kernels.triton.common.device_limits import has_fp8

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the bits below the sign
FP8_MAX = 448.0  # of float8_e4m3fn: beyond it, some versions of torch give NaN
MAX_CPU_ROWS = 8  # that a CPU multiplies by codes as they are; more pay for a dense copy of the matrix
CPU_GROUP_SIZE = 32  # inputs that share a scale where a CPU multiplies them as whole numbers


class QuantizedWeight(NamedTuple):
    """scale: float32, float16, or uint8 for 2^(it - 127), of codes that are e2m1. zero: int8, None where all are 0.

    low, as scale: what a code of no bits stands for, in forms that say it so; then there are no zeros.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group_size: int
    low: Tensor | None = None

    @property
    def is_e2m1(self) -> bool:
        return self.scale.dtype == torch.uint8


class RowRounding(NamedTuple):
    """How a row's inputs are rounded before a product: what `round_rows` is told."""

    kind: str
    group_size: int | None = None
    scale: Tensor | None = None


class NormOfRow(NamedTuple):
    """The norm before a product, of x + residual, or of x."""

    residual: Tensor | None
    weight: Tensor
    eps: float


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """W [outputs, inputs]."""
    if use_triton(weight.codes) and (weight.codes.dtype != torch.float8_e4m3fn or has_fp8(weight.codes.device)):
        from nanovllm.kernels.triton.linear.quantized_linear import dequantize_triton

        return dequantize_triton(weight, dtype)
    if weight.codes.is_cpu and (kernels := load_cpu_kernels()) is not None:
        dense = kernels.quantized_linear(None, weight.codes, weight.scale, weight.zero, weight.low, None, dtype)
        if dense is not None:
            return dense
    return dequantize_reference(weight, dtype)


def dequantize_reference(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    values = (unpack_int4(weight.codes) if weight.codes.dtype == torch.uint8 else weight.codes).float()
    offset, scale = weight.zero, weight.scale.float()
    if weight.is_e2m1:
        numbers = torch.tensor([*E2M1, *(-number for number in E2M1)], device=values.device)
        values, scale = numbers[(values + 8).long()], torch.exp2(scale - 127)
    if weight.low is not None:
        offset = -8 * torch.ones_like(weight.scale) if weight.codes.dtype == torch.uint8 else None
    size, num_inputs = weight.group_size, values.shape[1]
    if offset is not None:
        values = values - _by_input(offset.float(), size, num_inputs)
    values = values * _by_input(scale, size, num_inputs)
    if weight.low is not None:
        values = values + _by_input(weight.low.float(), size, num_inputs)
    return values.to(dtype)


def _by_input(of_groups: Tensor, group_size: int, num_inputs: int) -> Tensor:
    """[outputs, groups] -> [outputs, inputs], or [outputs, 1] where there is one group."""
    if of_groups.shape[1] == 1:
        return of_groups
    return of_groups.repeat_interleave(group_size, dim=1)[:, :num_inputs]


def pack_int4(values: Tensor) -> Tensor:
    """values [outputs, inputs] in -8 .. 7 -> codes; a multiple of 32 inputs."""
    first, second = (values + 8).to(torch.uint8).unflatten(1, (-1, 2, 16)).unbind(2)
    return (first | second << 4).flatten(1)


def unpack_int4(codes: Tensor) -> Tensor:
    """The values, int8."""
    pairs = codes.unflatten(1, (-1, 16))
    return torch.stack((pairs & 15, pairs >> 4), dim=2).flatten(1).to(torch.int8) - 8


def quantized_linear(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, semaphores: Tensor | None = None
) -> Tensor:
    """x W^T + b. x [num_rows, inputs] -> [num_rows, outputs]. semaphores: for split-K on a GPU, where the caller
    keeps some (`skinny_gemm.new_semaphores`)."""
    if use_triton(x):
        from nanovllm.kernels.triton.linear.quantized_linear import choose, quantized_linear_triton

        config = choose(x, weight)
        if config is not None:
            return quantized_linear_triton(x, weight, bias, config, semaphores)
    elif x.shape[0] <= MAX_CPU_ROWS and (kernels := load_cpu_kernels()) is not None:
        codes, scale, zero, _, low = weight
        product = kernels.quantized_linear(x, codes, scale, zero, low, bias, x.dtype)
        if product is not None:
            return product
    return F.linear(x, dequantize(weight, x.dtype), bias)


def fused_row(
    x: Tensor,
    norm: NormOfRow | None,
    weight: QuantizedWeight,
    bias: Tensor | None,
    rounding: RowRounding | None,
    gate: str | None,
) -> tuple[Tensor, Tensor] | None:
    """Of one row on a GPU, (gate(quantized_linear(round_rows(norm of x + residual))), x + residual), in one kernel but
    for what does not fit in. gate: "silu" or "gelu_tanh". None: it is to be done in sequence."""
    if x.shape[0] != 1 or not use_triton(x):
        return None
    from nanovllm.kernels.triton.linear.quantized_linear import choose, fused_row_triton, fuses_norm, fuses_rounding

    if choose(x, weight) is None:
        return None
    total = None
    fits = rounding is None or fuses_rounding(weight, rounding)
    if norm is not None and not (fits and fuses_norm(x, norm.weight)):
        residual, norm_weight, eps = norm
        if residual is None:
            x, total = rms_norm(x, norm_weight, eps), x
        else:
            x, total = add_rms_norm(x, residual, norm_weight, eps)
        norm = None
    if rounding is not None and not fits:
        x, rounding = round_rows(x, *rounding), None
    product, own_total = fused_row_triton(x, norm, weight, bias, rounding, gate)
    return product, own_total if total is None else total


def rounded_product(weight: QuantizedWeight) -> RoundedProduct | None:
    """On a CPU, what multiplies round_rows(x, "int8", CPU_GROUP_SIZE) by these weights in whole numbers: for any number
    of rows, each as it would be alone. None: nothing does, and `quantized_linear` is to be called."""
    if weight.codes.is_cpu and weight.zero is None and (kernels := load_cpu_kernels()) is not None:
        return kernels.rounded_product(weight.codes, weight.scale, weight.low)
    return None


def fp8_linear(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, semaphores: Tensor | None = None
) -> Tensor:
    """quantized_linear(round_rows(x, "fp8"), weight, bias), for codes "fp8" with a scale an output.

    On a GPU that multiplies FP8 it does, for more than one row.
    """
    if use_triton(x):
        from nanovllm.kernels.triton.linear.quantized_linear import quantize_rows_triton

        if x.shape[0] > 1 and _multiplies_fp8(x, weight):
            codes, scales = quantize_rows_triton(x, "fp8")
            # Not the fast accumulation: it is off by some percent.
            product = torch._scaled_mm(
                codes, weight.codes.t(), scales, weight.scale.t(), out_dtype=x.dtype, use_fast_accum=False
            )
            return product if bias is None else product + bias
    return quantized_linear(round_rows(x, "fp8"), weight, bias, semaphores)


def int8_linear(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, semaphores: Tensor | None = None
) -> Tensor:
    """quantized_linear(round_rows(x, "int8"), weight, bias), for codes "int8" with a scale an output.

    On a CPU in whole numbers, which its matrix instructions are for.
    """
    if x.is_cpu:
        codes, scales = quantize_rows(x, "int8")
        product = (_whole_product(codes, weight.codes).float() * scales * weight.scale.t()).to(x.dtype)
        return product if bias is None else product + bias
    return quantized_linear(round_rows(x, "int8"), weight, bias, semaphores)


def _whole_product(x: Tensor, codes: Tensor) -> Tensor:
    """x [rows, inputs] times codes [outputs, inputs], int8, on a CPU: exact, int32."""
    if _multiplies_int8():
        return torch._int_mm(x, codes.t())
    # Of 1,024 inputs, float32 holds every sum there may be.
    parts = zip(x.split(1024, dim=1), codes.split(1024, dim=1), strict=True)
    return torch.stack([(a.float() @ b.float().t()).int() for a, b in parts]).sum(0, dtype=torch.int32)


@cache
def _multiplies_int8() -> bool:
    """Whether PyTorch's products of int8 are exact on this CPU.

    With AVX2 alone oneDNN adds pairs in 16 bits, which large ones do not fit ("Nuances of int8 computations").
    """
    codes = torch.full((64, 256), 127, dtype=torch.int8)
    return bool((torch._int_mm(codes, codes.t()) == 127 * 127 * 256).all())


def _multiplies_fp8(x: Tensor, weight: QuantizedWeight) -> bool:
    sizes = weight.codes.shape
    return x.dtype == torch.bfloat16 and has_fp8(x.device) and not (sizes[0] % 16 or sizes[1] % 16)


def round_rows(x: Tensor, kind: str, group_size: int | None = None, scale: Tensor | None = None) -> Tensor:
    """x as 8-bit codes times a scale say it: the largest number of each row, or of `group_size` inputs of it, is the
    largest code, unless `scale` (one number) is given.

    kind: "fp8" or "int8". x [num_rows, inputs] -> the same shape and dtype.
    """
    if use_triton(x) and (kind != "fp8" or has_fp8(x.device)):
        from nanovllm.kernels.triton.linear.quantized_linear import round_rows_triton

        return round_rows_triton(x, kind, group_size, scale)
    return round_rows_reference(x, kind, group_size, scale)


def round_rows_reference(x: Tensor, kind: str, group_size: int | None, scale: Tensor | None) -> Tensor:
    codes, scales = quantize_rows(x, kind, group_size, scale)
    if group_size is not None:
        scales = _by_input(scales, group_size, x.shape[1])
    return (codes.float() * scales).to(x.dtype)


def quantize_rows(
    x: Tensor, kind: str, group_size: int | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(codes, float32 scales) of `round_rows`: codes as x, scales [num_rows, groups], or `scale`."""
    largest = FP8_MAX if kind == "fp8" else 127.0
    values, num_inputs = x.float(), x.shape[1]
    if scale is None:
        size = group_size or num_inputs
        groups = F.pad(values, (0, -num_inputs % size)).unflatten(1, (-1, size))
        scale = groups.abs().amax(dim=2).clamp(min=1e-12) / largest
        scaled = values / _by_input(scale, size, num_inputs)
    else:
        scaled = values / scale
    scaled = scaled.clamp(-largest, largest)
    return (scaled.to(torch.float8_e4m3fn) if kind == "fp8" else scaled.round().to(torch.int8)), scale
