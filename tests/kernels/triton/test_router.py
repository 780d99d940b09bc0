"""The Triton router against its reference: norm, product and choice of one token's experts in one kernel."""

import pytest
import torch

from nanovllm.kernels.router import Router, rms_norm_route_reference
from nanovllm.kernels.routing import Routing
from tests.kernels.twins import DEVICE, DTYPES, TOLERANCE, load_twin, randn, relative_error, twin_test

twin = load_twin("router")
pytestmark = twin_test


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(
    ("num_experts", "hidden", "is_float", "routing"),
    [
        (6, 272, False, Routing(2)),
        (12, 80, True, Routing(3, scores="sigmoid", has_bias=True, num_groups=4, top_groups=2, scale=2.5)),
        (130, 48, True, Routing(4, renormalize=False)),
    ],
)
def test_equals_the_reference(
    dtype: torch.dtype, num_experts: int, hidden: int, is_float: bool, routing: Routing
) -> None:
    """Twice, as counters are to be 0 again; the first choices are far apart, so that rounding chooses nothing."""
    torch.manual_seed(0)
    weight_dtype = torch.float32 if is_float else dtype
    weight = randn(num_experts, hidden, dtype=weight_dtype) / hidden**0.5
    bias = None if is_float else randn(num_experts, dtype=weight_dtype)
    correction = randn(num_experts, dtype=torch.float32) if routing.has_bias else None
    router = Router(weight, bias, correction, routing)
    norm_weight, semaphores = randn(hidden, dtype=dtype), torch.zeros(4, dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        x, residual = randn(1, hidden, dtype=dtype), randn(1, hidden, dtype=dtype)
        assert twin.takes(x, router) and not twin.takes(x.expand(2, -1), router)
        got = twin.rms_norm_route_triton(x, residual, norm_weight, 1e-5, router, semaphores)
        want = rms_norm_route_reference(x, residual, norm_weight, 1e-5, router)
        assert torch.equal(got[3], want[3]) and not semaphores.any()
        assert torch.equal(got[1], want[1])
        assert relative_error(got[0], want[0]) < TOLERANCE[dtype]
        assert relative_error(got[2], want[2]) < TOLERANCE[dtype]
