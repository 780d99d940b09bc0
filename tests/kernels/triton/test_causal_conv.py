"""The Triton convolutions with a state against their references."""

import pytest
import torch

from nanovllm.kernels.causal_conv import conv_silu_reference, short_conv_reference
from tests.kernels.state_cases import make_states_case
from tests.kernels.test_causal_conv import CASES
from tests.kernels.twins import DEVICE, DTYPES, TOLERANCE, load_twin, randn, relative_error, twin_test

twin = load_twin("causal_conv")
pytestmark = twin_test


@pytest.mark.parametrize("lens, before", CASES)
@pytest.mark.parametrize("is_gated, width, has_bias", [(True, 3, False), (True, 2, True), (False, 4, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(
    lens: list[int], before: list[int], is_gated: bool, width: int, has_bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    channels = 83
    case = make_states_case(lens, before, num_padding=2, device=DEVICE)
    x = randn(case.num_tokens, channels * (3 if is_gated else 1), dtype=dtype)
    weight, bias = randn(width, channels, dtype=dtype), randn(channels, dtype=dtype) if has_bias else None
    state = case.states(width - 1, channels)
    want_state = state.clone()
    reference = short_conv_reference if is_gated else conv_silu_reference
    want = reference(x, weight, bias, want_state, case.step)
    got = twin.causal_conv_triton(x, weight, bias, state, case.step, is_gated=is_gated)
    assert relative_error(got, want) < TOLERANCE[dtype]
    assert torch.equal(state, want_state)
