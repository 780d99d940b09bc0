"""The Triton router against its reference: every rule, and whatever the logits are."""

import pytest
import torch

from nanovllm.kernels.routing import Routing, route_reference
from tests.kernels.test_routing import RULES, rule_inputs
from tests.kernels.twins import DEVICE, DTYPES, load_twin, twin_test

twin = load_twin("routing")
pytestmark = twin_test


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_equals_reference(dtype: torch.dtype, num_tokens: int, name: str) -> None:
    """Rows of the logits lie apart."""
    given, bias, routing = rule_inputs(name, num_tokens)
    logits = torch.empty(num_tokens, 2, given.shape[1], dtype=dtype, device=DEVICE)[:, 1]
    logits.copy_(given)
    bias = None if bias is None else bias.to(DEVICE)
    weights, expert_ids = twin.route_triton(logits, bias, routing)
    want_weights, want_ids = route_reference(logits, bias, routing)
    assert torch.equal(expert_ids, want_ids)
    torch.testing.assert_close(weights, want_weights, atol=1e-6, rtol=1e-5)


def test_many_experts_in_groups() -> None:
    """DeepSeek-V3's 256 in 8 groups, and 160 in groups that are no power of two."""
    torch.manual_seed(0)
    for num_experts, num_groups in ((256, 8), (160, 5)):
        routing = Routing(8, scores="sigmoid", has_bias=True, num_groups=num_groups, top_groups=4, scale=2.5)
        logits, bias = torch.randn(3, num_experts, device=DEVICE), torch.randn(num_experts, device=DEVICE)
        weights, expert_ids = twin.route_triton(logits, bias, routing)
        want_weights, want_ids = route_reference(logits, bias, routing)
        assert torch.equal(expert_ids, want_ids)
        torch.testing.assert_close(weights, want_weights, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["softmax-renormalized", "sigmoid-bias-groups"])
def test_ids_stay_in_range_whatever_the_logits_are(name: str) -> None:
    num_experts, routing = RULES[name]
    logits = torch.full((3, num_experts), float("nan"), device=DEVICE)
    logits[1] = float("-inf")
    logits[2] = 0.0
    bias = torch.zeros(num_experts, device=DEVICE) if routing.has_bias else None
    _, expert_ids = twin.route_triton(logits, bias, routing)
    assert ((expert_ids >= 0) & (expert_ids < num_experts)).all()
    assert expert_ids[2].tolist() == list(range(routing.top_k))
