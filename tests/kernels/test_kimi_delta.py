"""Kimi delta attention: its reference beside the rule itself, C++ beside the reference."""

import pytest
import torch
from torch import Tensor

from nanovllm.kernels.cpu.cpu_kernels import load_cpu_kernels
from nanovllm.kernels.kimi_delta import KimiDelta, kimi_delta_reference
from nanovllm.kernels.state_types import LayerState
from tests.kernels.state_cases import StateCase, make_states_case
from tests.kernels.test_delta_net import CASES, copy

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, KimiDelta, LayerState]


def make_inputs(case: StateCase, num_heads: int, dim: int, dtype: torch.dtype, width: int = 4) -> Inputs:
    """What `kimi_delta` takes before the step; tokens of queries, keys and values are apart from each other."""
    values, device = num_heads * dim, case.step.rows.device
    net = KimiDelta(
        conv_weight=torch.randn(width, 3 * values).to(device, dtype),
        decay=torch.rand(num_heads).to(device) * 0.5,
        dt_bias=torch.randn(values).to(device),
        norm_weight=torch.randn(dim).to(device, dtype),
        eps=1e-5,
    )
    qkvb = torch.randn(case.num_tokens, 3 * values + num_heads).to(device, dtype)
    f, z = (torch.randn(case.num_tokens, values).to(device, dtype) for _ in range(2))
    state = LayerState(case.states(width - 1, 3 * values), case.states(num_heads, dim, dim))
    return qkvb[:, : 3 * values], f, qkvb[:, 3 * values :], z, net, state


def test_a_prompt_in_parts_is_the_whole() -> None:
    """With the state of any token, what comes behind it is the same."""
    torch.manual_seed(0)
    case = make_states_case([40], [0], every=16)
    *tensors, net, state = make_inputs(case, 2, 12, torch.float32)
    whole = kimi_delta_reference(*tensors, net, state, case.step)
    slot = int(case.step.snapshots[15])
    rest = make_states_case([24], [16], every=1000)
    rest.step.rows[0] = slot
    behind = kimi_delta_reference(*(tensor[16:] for tensor in tensors), net, state, rest.step)
    torch.testing.assert_close(behind, whole[16:])
    torch.testing.assert_close(state.matrices[slot], state.matrices[case.step.rows[0]])
    assert torch.equal(state.conv[slot], state.conv[case.step.rows[0]])


def test_each_number_of_a_key_is_forgotten_by_itself() -> None:
    """A value written for two keys; then one of their numbers is forgotten, and a third key finds the other's."""
    case = make_states_case([2], [0])
    net = KimiDelta(torch.zeros(4, 12), torch.ones(1), torch.zeros(4), torch.ones(4), 0.0)
    net.conv_weight[3] = 1.0
    key, value, nothing = torch.tensor([50.0, 50.0, 0.0, 0.0]), torch.tensor([20.0, 30.0, 40.0, 50.0]), torch.zeros(4)
    qkv = torch.stack((torch.cat((key, key, value)), torch.cat((key, nothing, nothing))))
    f = torch.tensor([[-1000.0] * 4, [1000.0, -1000.0, -1000.0, -1000.0]])
    state = LayerState(case.states(3, 12), case.states(1, 4, 4))
    out = kimi_delta_reference(qkv, f, torch.full((2, 1), 1000.0), torch.full((2, 4), 30.0), net, state, case.step)
    left = state.matrices[case.step.rows[0], 0]
    torch.testing.assert_close(left, torch.stack((nothing, value * 0.5**0.5, nothing, nothing)))
    torch.testing.assert_close(out, (value / value.square().mean().sqrt()).expand(2, 4))


@pytest.mark.parametrize("lens, before", CASES)
@pytest.mark.parametrize("dim", [12, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpp_equals_the_reference(lens: list[int], before: list[int], dim: int, dtype: torch.dtype) -> None:
    """And its bits depend neither on the other requests nor on where a prompt is cut."""
    kernels = load_cpu_kernels()
    if kernels is None:
        pytest.skip("needs a C++ compiler")
    torch.manual_seed(1)
    case = make_states_case(lens, before, num_padding=2)
    *tensors, net, state = make_inputs(case, 3, dim, dtype)
    start, want_state = copy(state), copy(state)
    want = kimi_delta_reference(*tensors, net, want_state, case.step)
    got = kernels.kimi_delta(*tensors, net, state, case.step)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state.matrices, want_state.matrices, rtol=tolerance, atol=tolerance)
    assert torch.equal(state.conv, want_state.conv)
    rows, cut, parts = [tensor[-lens[-1] :] for tensor in tensors], lens[-1] // 2, []
    for first, last in ((0, cut), (cut, lens[-1])):
        step = make_states_case([last - first], [before[-1] + first], every=1000).step
        step.rows[0] = case.step.rows[len(lens) - 1]
        if last > first:
            parts.append(kernels.kimi_delta(*(row[first:last] for row in rows), net, start, step))
    assert torch.equal(torch.cat(parts), got[-lens[-1] :])
