"""The gated delta net: its reference beside the rule itself, C++ beside the reference."""

import pytest
import torch
from torch import Tensor

from nanovllm.kernels.cpu.cpu_kernels import load_cpu_kernels
from nanovllm.kernels.delta_net import DeltaNet, delta_net_reference
from nanovllm.kernels.state_types import LayerState
from tests.kernels.state_cases import StateCase, make_states_case

CASES = [([1, 1, 1], [0, 3, 50]), ([1, 2, 70, 33], [9, 1, 0, 4]), ([130], [70])]
SIZES = [(2, 4, 8, 12), (1, 3, 128, 128), (2, 2, 30, 40)]  # key heads, value heads, size of a key and of a value


def make_inputs(
    case: StateCase, sizes: tuple[int, int, int, int], dtype: torch.dtype, width: int = 4
) -> tuple[Tensor, Tensor, DeltaNet, LayerState]:
    """What `delta_net` takes before the step; the states are apart from each other."""
    key_heads, value_heads, keys, values = sizes
    channels, device = 2 * key_heads * keys + value_heads * values, case.step.rows.device
    net = DeltaNet(
        conv_weight=torch.randn(width, channels).to(device, dtype),
        decay=torch.rand(value_heads).to(device) * 0.5,
        dt_bias=torch.randn(value_heads).to(device),
        norm_weight=torch.randn(values).to(device, dtype),
        eps=1e-6,
        num_key_heads=key_heads,
    )
    qkvz = torch.randn(case.num_tokens, channels + value_heads * values).to(device, dtype)
    ba = torch.randn(case.num_tokens, 2 * value_heads).to(device, dtype)
    state = LayerState(case.states(width - 1, channels), case.states(value_heads, keys, values))
    return qkvz, ba, net, state


def copy(state: LayerState) -> LayerState:
    return LayerState(state.conv.clone(), state.matrices.clone())


def test_a_prompt_in_parts_is_the_whole() -> None:
    """With the state of any token, what comes behind it is the same."""
    torch.manual_seed(0)
    case = make_states_case([40], [0], every=16)
    qkvz, ba, net, state = make_inputs(case, SIZES[0], torch.float32)
    whole = delta_net_reference(qkvz, ba, net, state, case.step)
    slot = int(case.step.snapshots[15])
    rest = make_states_case([24], [16], every=1000)
    rest.step.rows[0] = slot
    assert torch.equal(delta_net_reference(qkvz[16:], ba[16:], net, state, rest.step), whole[16:])
    assert torch.equal(state.matrices[slot], state.matrices[case.step.rows[0]])
    assert torch.equal(state.conv[slot], state.conv[case.step.rows[0]])


def test_a_key_finds_the_value_that_was_written_for_it() -> None:
    """With beta 1 and nothing forgotten, the newest value of a key takes the place of the one before."""
    case = make_states_case([3], [0])
    net = DeltaNet(torch.zeros(4, 12), torch.zeros(1), torch.zeros(1), torch.ones(4), 0.0, 1)
    net.conv_weight[3] = 1.0
    key, values = torch.tensor([100.0, 0.0, 0.0, 0.0]), 50 * torch.eye(4)[:3] + 20
    qkv = torch.cat((key.expand(3, 4), key.expand(3, 4), values), dim=1)
    ba = torch.tensor([[1000.0, 0.0]]).expand(3, 2).contiguous()
    state = LayerState(case.states(3, 12), case.states(1, 4, 4))
    out = delta_net_reference(torch.cat((qkv, torch.full((3, 4), 30.0)), dim=1), ba, net, state, case.step)
    expected = values / values.square().mean(1, keepdim=True).sqrt() * 30
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(state.matrices[case.step.rows[0], 0, 0], values[2])


@pytest.mark.parametrize("lens, before", CASES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpp_equals_the_reference(
    lens: list[int], before: list[int], sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    kernels = load_cpu_kernels()
    if kernels is None:
        pytest.skip("needs a C++ compiler")
    torch.manual_seed(1)
    case = make_states_case(lens, before, num_padding=2)
    qkvz, ba, net, state = make_inputs(case, sizes, dtype)
    want_state = copy(state)
    want = delta_net_reference(qkvz, ba, net, want_state, case.step)
    got = kernels.delta_net(qkvz, ba, net, state, case.step)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state.matrices, want_state.matrices, rtol=tolerance, atol=tolerance)
    assert torch.equal(state.conv, want_state.conv)
    alone = make_states_case(lens[-1:], before[-1:], every=1000)
    alone.step.rows[0] = case.step.rows[len(lens) - 1]
    fresh = make_inputs(case, sizes, dtype)[3]
    fresh.conv.copy_(want_state.conv), fresh.matrices.copy_(want_state.matrices)
    again = copy(fresh)
    first = kernels.delta_net(qkvz[-lens[-1] :], ba[-lens[-1] :], net, fresh, alone.step)
    if lens[-1] > 1:
        cut = lens[-1] // 2
        parts = []
        for part, start in ((slice(0, cut), 0), (slice(cut, None), cut)):
            rows, gates = qkvz[-lens[-1] :][part], ba[-lens[-1] :][part]
            step = make_states_case([len(rows)], [before[-1] + start], every=1000).step
            step.rows[0] = alone.step.rows[0]
            parts.append(kernels.delta_net(rows, gates, net, again, step))
        assert torch.equal(torch.cat(parts), first), "the bits do not depend on where a prompt is cut"
