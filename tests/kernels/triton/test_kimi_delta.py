"""Kimi delta attention in Triton against its reference."""

import pytest
import torch

from nanovllm.kernels.kimi_delta import kimi_delta_reference
from tests.kernels.state_cases import make_states_case, on_host
from tests.kernels.test_kimi_delta import make_inputs
from tests.kernels.twins import DEVICE, DTYPES, INTERPRETED, load_twin, relative_error, twin_test

twin = load_twin("kimi_delta")
pytestmark = twin_test
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
SIZES = [(2, 20)] if INTERPRETED else [(4, 12), (8, 128), (2, 80)]


@pytest.mark.parametrize(
    "lens, before, is_exact",
    [([1] * 4, [0, 3, 50, 1], False), ([1, 2, 20, 12], [9, 1, 44, 0], False), ([1, 2, 5], [9, 1, 44], True)],
)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(
    dtype: torch.dtype, sizes: tuple[int, int], lens: list[int], before: list[int], is_exact: bool
) -> None:
    """Snapshots at multiples of 16, where chunks end."""
    torch.manual_seed(1)
    case = make_states_case(lens, before, num_padding=2, device=DEVICE, every=16)
    *tensors, net, state = make_inputs(case, *sizes, dtype)
    host_net, host, step = on_host(net, state, case.step)
    want = kimi_delta_reference(*(tensor.cpu() for tensor in tensors), host_net, host, step)
    got = twin.kimi_delta_triton(*tensors, net, state, case.step, is_exact)
    assert relative_error(got.cpu(), want) < TOLERANCE[dtype]
    assert relative_error(state.matrices.cpu(), host.matrices) < TOLERANCE[dtype]
    assert torch.equal(state.conv.cpu(), host.conv)


@pytest.mark.parametrize("is_exact", [False, True])
def test_tokens_of_padding_give_zeros(is_exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind the prompts of a captured step: a request without a row and without a length. Also a matrix of which
    some columns are in registers at a time."""
    monkeypatch.setattr(twin, "CELLS", 512)
    case = make_states_case([3, 21], [0, 0], device=DEVICE, every=1000)
    case.step.rows[1], case.step.meta.seq_lens[1] = -1, 0
    *tensors, net, state = make_inputs(case, 2, 20, torch.float32)
    kept = state.matrices.clone()
    kept[case.step.rows[0]] = 0
    out = twin.kimi_delta_triton(*tensors, net, state, case.step, is_exact)
    assert torch.isfinite(out).all() and not out[3:].any()
    state.matrices[case.step.rows[0]] = 0
    assert torch.equal(state.matrices, kept)
