"""The Triton forms of Mamba-2 against the reference: decodes in one launch, prompts in chunks and token by token."""

import pytest
import torch

from nanovllm.kernels.mamba2 import mamba2_reference
from tests.kernels.state_cases import make_states_case, on_host
from tests.kernels.test_mamba2 import make_inputs
from tests.kernels.triton.test_delta_net import LENS, TOLERANCE
from tests.kernels.twins import DEVICE, DTYPES, INTERPRETED, load_twin, relative_error, twin_test

twin = load_twin("mamba2")
pytestmark = twin_test
SIZES = [(1, 2, 20, 40)] if INTERPRETED else [(2, 6, 8, 12), (1, 8, 128, 64), (4, 8, 128, 80), (1, 2, 256, 64)]


@pytest.mark.parametrize(
    "is_exact, has_bias, has_norm", [(False, True, True), (True, False, True), (False, False, False)]
)
@pytest.mark.parametrize("lens, before", LENS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    lens: list[int],
    before: list[int],
    is_exact: bool,
    has_bias: bool,
    has_norm: bool,
) -> None:
    """Snapshots at multiples of 64, where a chunk ends, too."""
    if INTERPRETED and dtype != torch.float32 and not has_bias:
        pytest.skip("as in float32")
    if INTERPRETED and is_exact:  # each token is a turn of a loop there
        lens, before = [min(n, 9) for n in lens], [min(n, 57) for n in before]
    torch.manual_seed(1)
    case = make_states_case(lens, before, num_padding=2, device=DEVICE, every=64)
    zxbcdt, net, state = make_inputs(case, sizes, dtype, has_bias=has_bias, has_norm=has_norm)
    host_net, host, step = on_host(net, state, case.step)
    want = mamba2_reference(zxbcdt.cpu(), host_net, host, step)
    semaphores = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    got = twin.mamba2_triton(zxbcdt, net, state, case.step, is_exact, semaphores)
    assert relative_error(got.cpu(), want) < TOLERANCE[dtype]
    assert relative_error(state.matrices.cpu(), host.matrices) < TOLERANCE[dtype]
    assert torch.equal(state.conv.cpu(), host.conv)
    assert not semaphores.any()
