"""Causal convolutions with a state: the reference beside PyTorch's convolution, the twins beside the reference."""

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels.causal_conv import conv_silu_reference, short_conv_reference
from nanovllm.kernels.cpu.cpu_kernels import load_cpu_kernels
from tests.kernels.state_cases import make_states_case

CASES = [([1, 1, 1], [0, 3, 50]), ([1, 2, 70, 33], [9, 1, 0, 4]), ([5], [0])]


def test_the_reference_is_a_convolution_of_the_whole_history() -> None:
    """A prompt in three parts; its state behind each fifth token and behind its end is its last inputs."""
    torch.manual_seed(0)
    channels, width = 6, 4
    weight, bias, x = torch.randn(width, channels), torch.randn(channels), torch.randn(23, channels)
    whole = F.conv1d(F.pad(x.T, (width - 1, 0)), weight.T.unsqueeze(1), bias, groups=channels).T
    cases = [make_states_case([n], [before]) for n, before in ((11, 0), (1, 11), (11, 12))]
    state = max(cases, key=lambda case: case.num_slots).states(width - 1, channels)
    for case, part, expected in zip(cases, x.split([11, 1, 11]), whole.split([11, 1, 11]), strict=True):
        case.step.rows[0] = 1
        got = conv_silu_reference(part, weight, bias, state, case.step)
        torch.testing.assert_close(got, F.silu(expected))
        start = case.step.meta.seq_lens[0] - len(part)
        for token, slot in enumerate(case.step.snapshots.tolist()):
            if slot >= 0:
                torch.testing.assert_close(state[slot], x[start + token - 2 : start + token + 1])
    torch.testing.assert_close(state[1], x[-3:])


@pytest.mark.parametrize("lens, before", CASES)
@pytest.mark.parametrize("is_gated, width, has_bias", [(True, 3, False), (True, 2, True), (False, 4, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpp_equals_the_reference(
    lens: list[int], before: list[int], is_gated: bool, width: int, has_bias: bool, dtype: torch.dtype
) -> None:
    kernels = load_cpu_kernels()
    if kernels is None:
        pytest.skip("needs a C++ compiler")
    torch.manual_seed(1)
    channels = 83
    case = make_states_case(lens, before, num_padding=2)
    x = torch.randn(case.num_tokens, 3 * channels + 5).to(dtype)[:, : 3 * channels if is_gated else channels]
    weight = torch.randn(width, channels).to(dtype)
    bias = torch.randn(channels).to(dtype) if has_bias else None
    state = case.states(width - 1, channels)
    want_state = state.clone()
    reference = short_conv_reference if is_gated else conv_silu_reference
    want = reference(x, weight, bias, want_state, case.step)
    got = (kernels.short_conv if is_gated else kernels.conv_silu)(x, weight, bias, state, case.step)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.float(), want.float(), rtol=4 * eps, atol=4 * eps)
    assert torch.equal(state, want_state)
