"""Experts in 4 and 8 bits in Triton, against the reference: a dense copy of each expert's matrices."""

from typing import Any

import pytest
import torch

from nanovllm.kernels import moe
from nanovllm.kernels.quantized_linear import QuantizedWeight, dequantize_reference, round_rows_reference
from nanovllm.kernels.quantized_moe import Stack
from nanovllm.kernels.routing import Routing, route_reference
from tests.kernels.triton.plain_codes import plain_split_int4
from tests.kernels.twins import DEVICE, DTYPES, INTERPRETED, TOLERANCE, load_twin, randn, relative_error, twin_test

twin = load_twin("quantized_moe")
dequantize_triton = load_twin("linear.quantized_linear").dequantize_triton
pytestmark = twin_test
CODES = {"int4": torch.uint8, "e2m1": torch.uint8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
KINDS = [("int4", 32, True), ("int4", 64, False), ("int4", None, False), ("int8", None, False), ("int8", 32, True)]
KINDS += [("e2m1", 32, False)]
SIZES = [(1, 5, 3), (6, 4, 2), (40, 2, 2)]
if not INTERPRETED:
    SIZES += [(1, 8, 8), (34, 4, 2)]
    KINDS += [("fp8", None, False), ("fp8", 64, False)]


def make_stack(
    num_experts: int, outputs: int, inputs: int, kind: str, group_size: int | None, has_zeros: bool
) -> Stack:
    rows, groups = num_experts * outputs, 1 if group_size is None else inputs // group_size
    if kind == "fp8":
        codes = torch.randn(rows, inputs).to(CODES[kind])
    else:
        per_byte = 1 + (CODES[kind] == torch.uint8)
        codes = torch.randint(*((0, 256) if per_byte == 2 else (-127, 128)), (rows, inputs // per_byte))
    if kind == "e2m1":
        scale = torch.randint(121, 125, (groups, rows), dtype=torch.uint8).to(DEVICE).t()  # as a GPU has it
        return Stack(QuantizedWeight(codes.to(CODES[kind]).to(DEVICE), scale, None, inputs // groups), num_experts)
    scale = (torch.rand(rows, groups) + 0.5) / inputs**0.5 / {"int4": 4, "int8": 60, "fp8": 1}[kind]
    zero = torch.randint(-8, 8, (rows, groups), dtype=torch.int8).to(DEVICE) if has_zeros else None
    weight = QuantizedWeight(codes.to(CODES[kind]).to(DEVICE), scale.to(DEVICE), zero, group_size or inputs)
    return Stack(weight, num_experts)


@pytest.fixture(autouse=True)
def without_assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter knows none."""
    if INTERPRETED:
        monkeypatch.setattr(twin, "split_int4", plain_split_int4)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("kind", "group_size", "has_zeros"), KINDS)
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), SIZES)
def test_experts_equal_reference(
    dtype: torch.dtype,
    kind: str,
    group_size: int | None,
    has_zeros: bool,
    num_tokens: int,
    num_experts: int,
    top_k: int,
) -> None:
    torch.manual_seed(0)
    hidden, intermediate = 128, 64
    gate_up = make_stack(num_experts, 2 * intermediate, hidden, kind, group_size, has_zeros)
    down = make_stack(num_experts, hidden, intermediate, kind, group_size, has_zeros)
    x = randn(num_tokens, hidden, dtype=dtype)
    weights, expert_ids = route_reference(randn(num_tokens, num_experts, dtype=dtype), None, Routing(top_k))
    assert twin.takes(x, gate_up, down, expert_ids)
    if num_tokens == 1:
        assert torch.equal(dequantize_triton(down.weight, dtype), dequantize_reference(down.weight, dtype))

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        return round_rows_reference(rows, "int8", None, None)

    more: tuple[Any, ...] = ()
    if kind == "e2m1":  # as in gpt-oss
        biases = moe.Biases(*(randn(num_experts, size, dtype=dtype) for size in (2 * intermediate, hidden)))
        more = biases, moe.Gate("clamped", 1.7, 2.0)
    for rounding in (None, rounded) if num_tokens == 6 else (None,):
        got = twin.quantized_experts_triton(x, gate_up, down, weights, expert_ids, rounding, *more)
        dense = [dequantize_reference(s.weight, torch.float32).unflatten(0, (num_experts, -1)) for s in (gate_up, down)]
        linear = torch.nn.functional.linear
        if rounding is not None:
            linear = lambda rows, weight, bias: torch.nn.functional.linear(rounded(rows), weight, bias)  # noqa: E731
        if more:
            more = moe.Biases(*(bias.float() for bias in biases)), more[1]
        want = moe.fused_experts_reference(x.float(), *dense, weights, expert_ids, *(more or (None, moe.SILU)), linear)
        assert relative_error(got, want) < (TOLERANCE[dtype] if rounding is None else 0.03)


def test_what_the_kernel_leaves_to_dense_numbers() -> None:
    x, ids = randn(4, 128, dtype=torch.float16), torch.zeros(4, 2, dtype=torch.int32, device=DEVICE)
    gate_up, down = make_stack(4, 64, 128, "int4", 32, True), make_stack(4, 128, 32, "int4", 32, True)
    assert twin.takes(x, gate_up, down, ids) and not twin.takes(x.float(), gate_up, down, ids)
    assert not twin.takes(x, gate_up, down, torch.zeros(400, 2, dtype=torch.int32))
    assert not twin.takes(x, gate_up, make_stack(4, 128, 48, "int8", 16, False), ids)
