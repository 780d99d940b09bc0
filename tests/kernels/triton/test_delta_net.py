"""The Triton forms of the gated delta net against the reference: token after token, and in chunks."""

import pytest
import torch

from nanovllm.kernels.delta_net import delta_net_reference
from tests.kernels.state_cases import make_states_case, on_host
from tests.kernels.test_delta_net import make_inputs
from tests.kernels.twins import DEVICE, DTYPES, INTERPRETED, load_twin, relative_error, twin_test

twin = load_twin("delta_net")
pytestmark = twin_test
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
SIZES = [(1, 2, 20, 40)] if INTERPRETED else [(2, 4, 8, 12), (4, 8, 128, 128), (2, 2, 64, 80)]
LENS = [([1] * 6, [0, 3, 50, 64, 127, 1]), ([1, 2, 70, 64], [9, 1, 40, 0])]


@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize("lens, before", LENS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(
    dtype: torch.dtype, sizes: tuple[int, int, int, int], lens: list[int], before: list[int], is_exact: bool
) -> None:
    """Snapshots at multiples of 64, where a chunk ends, too."""
    if INTERPRETED and is_exact:  # each token is a turn of a loop there
        if dtype != torch.float32:
            pytest.skip("as in float32")
        lens, before = [min(n, 9) for n in lens], [min(n, 57) for n in before]
    torch.manual_seed(1)
    case = make_states_case(lens, before, num_padding=2, device=DEVICE, every=64)
    qkvz, ba, net, state = make_inputs(case, sizes, dtype)
    host_net, host, step = on_host(net, state, case.step)
    want = delta_net_reference(qkvz.cpu(), ba.cpu(), host_net, host, step)
    semaphores = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    got = twin.delta_net_triton(qkvz, ba, net, state, case.step, is_exact, semaphores)
    assert relative_error(got.cpu(), want) < TOLERANCE[dtype]
    assert relative_error(state.matrices.cpu(), host.matrices) < TOLERANCE[dtype]
    assert torch.equal(state.conv.cpu(), host.conv)
    assert not semaphores.any()
