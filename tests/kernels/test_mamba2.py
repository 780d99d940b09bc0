"""Mamba-2: its reference beside a formula of the whole history, C++ beside the reference."""

import pytest
import torch
from torch import Tensor

from nanovllm.kernels.causal_conv import conv_silu_reference
from nanovllm.kernels.cpu.cpu_kernels import load_cpu_kernels
from nanovllm.kernels.mamba2 import Mamba2, gated_norm, heads, mamba2_reference
from nanovllm.kernels.state_types import LayerState
from tests.kernels.state_cases import StateCase, make_states_case
from tests.kernels.test_delta_net import CASES, copy

SIZES = [(2, 4, 8, 12), (1, 3, 128, 64), (2, 2, 30, 40)]  # groups, heads, size of a state and of a head


def make_inputs(
    case: StateCase,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    has_bias: bool = True,
    has_norm: bool = True,
) -> tuple[Tensor, Mamba2, LayerState]:
    """What `mamba2` takes before the step; the states are apart from each other."""
    groups, num_heads, state_dim, head_dim = sizes
    channels, device = 2 * groups * state_dim + num_heads * head_dim, case.step.rows.device
    net = Mamba2(
        conv_weight=torch.randn(4, channels).to(device, dtype),
        conv_bias=torch.randn(channels).to(device, dtype) if has_bias else None,
        decay=torch.rand(num_heads).to(device) * 0.5,
        dt_bias=torch.randn(num_heads).to(device) - 1.0,
        skip=torch.randn(num_heads).to(device),
        norm_weight=torch.randn(num_heads * head_dim).to(device, dtype) if has_norm else None,
        eps=1e-6,
        num_groups=groups,
        state_dim=state_dim,
    )
    zxbcdt = torch.randn(case.num_tokens, num_heads * head_dim + channels + num_heads).to(device, dtype)
    return zxbcdt, net, LayerState(case.states(3, channels), case.states(num_heads, state_dim, head_dim))


@pytest.mark.parametrize("has_norm", [False, True])
def test_the_reference_is_the_sum_over_the_history(has_norm: bool) -> None:
    """out[t] = sum over s <= t of c[t] b[s] dt[s] x[s], each faded by the steps behind it; in two parts the same."""
    torch.manual_seed(0)
    case = make_states_case([20], [0], every=8)
    zxbcdt, net, state = make_inputs(case, SIZES[0], torch.float32, has_norm=has_norm)
    z, xbc, dt = zxbcdt.split([net.num_values, net.conv_weight.shape[1], net.num_heads], dim=1)
    mixed = conv_silu_reference(xbc, net.conv_weight, net.conv_bias, copy(state).conv, case.step)
    x, b, c, dt = heads(mixed, dt, net)
    faded = (-net.decay * dt).cumsum(0)
    weight = torch.exp(faded[:, None] - faded[None]) * torch.einsum("thn,shn->tsh", c, b) * dt
    found = torch.einsum("tsh,shp->thp", weight * torch.ones(20, 20).tril()[..., None], x)
    expected = gated_norm((found + net.skip[:, None] * x).flatten(1), z, net)
    whole = mamba2_reference(zxbcdt, net, state, case.step)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)
    rest = make_states_case([12], [8], every=1000)
    rest.step.rows[0] = case.step.snapshots[7]
    assert torch.equal(mamba2_reference(zxbcdt[8:], net, state, rest.step), whole[8:])


@pytest.mark.parametrize("lens, before", CASES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpp_equals_the_reference(
    lens: list[int], before: list[int], sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """And its bits depend neither on the other requests nor on where a prompt is cut."""
    kernels = load_cpu_kernels()
    if kernels is None:
        pytest.skip("needs a C++ compiler")
    torch.manual_seed(1)
    case = make_states_case(lens, before, num_padding=2)
    has = len(lens) > 1
    zxbcdt, net, state = make_inputs(case, sizes, dtype, has_bias=has, has_norm=has)
    start, want_state = copy(state), copy(state)
    want = mamba2_reference(zxbcdt, net, want_state, case.step)
    got = kernels.mamba2(zxbcdt, net, state, case.step)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state.matrices, want_state.matrices, rtol=tolerance, atol=tolerance)
    assert torch.equal(state.conv, want_state.conv)
    rows, cut, parts = zxbcdt[-lens[-1] :], lens[-1] // 2, []
    for first, last in ((0, cut), (cut, lens[-1])):
        step = make_states_case([last - first], [before[-1] + first], every=1000).step
        step.rows[0] = case.step.rows[len(lens) - 1]
        parts.append(kernels.mamba2(rows[first:last], net, start, step) if last > first else rows[:0, : net.num_values])
    assert torch.equal(torch.cat(parts), got[-lens[-1] :])
