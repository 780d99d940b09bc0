"""What routing means, against a loop over tokens that is written after the papers."""

import pytest
import torch
from torch import Tensor

from nanovllm.kernels.routing import Routing, route

# name: (experts, rule)
RULES: dict[str, tuple[int, Routing]] = {
    "softmax": (10, Routing(3, renormalize=False)),
    "softmax-renormalized": (10, Routing(3)),
    "one-of-one": (1, Routing(1)),
    "sigmoid-bias": (9, Routing(3, scores="sigmoid", has_bias=True, scale=2.5, least_sum=1e-20)),
    "sigmoid-bias-groups": (
        12,
        Routing(4, False, scores="sigmoid", has_bias=True, num_groups=3, top_groups=2, scale=1.5),
    ),
    "softmax-groups-of-two": (8, Routing(2, num_groups=4, top_groups=1)),
    "softmax-best-of-a-group": (12, Routing(3, False, num_groups=4, top_groups=2, group_judges=1, scale=16.0)),
    "all-groups": (6, Routing(2, scores="sigmoid", has_bias=True, num_groups=2, top_groups=2)),
    "softmax-bias": (7, Routing(7, has_bias=True, least_sum=1e-12)),
}


def rule_inputs(name: str, num_tokens: int) -> tuple[Tensor, Tensor | None, Routing]:
    """Logits of which no two of a row are equal, so that the choice is one."""
    torch.manual_seed(0)
    num_experts, routing = RULES[name]
    logits = (torch.rand(num_tokens, num_experts).argsort(-1) - num_experts // 2) / 8
    return logits, 0.3 * torch.randn(num_experts) if routing.has_bias else None, routing


def route_token(logits: list[float], bias: list[float], routing: Routing) -> dict[int, float]:
    """Expert -> weight, best first."""
    values = torch.tensor(logits, dtype=torch.float64)
    scores = (values.sigmoid() if routing.scores == "sigmoid" else values.softmax(0)).tolist()
    compared = [score + more for score, more in zip(scores, bias, strict=True)]
    size = len(logits) // routing.num_groups
    groups = [range(first, first + size) for first in range(0, len(logits), size)]
    groups.sort(key=lambda group: -sum(sorted(compared[expert] for expert in group)[-routing.group_judges :]))
    among = [expert for group in groups[: routing.top_groups] for expert in group]
    chosen = sorted(among, key=lambda expert: -compared[expert])[: routing.top_k]
    total = sum(scores[expert] for expert in chosen) if routing.renormalize else 1.0
    return {expert: scores[expert] / total * routing.scale for expert in chosen}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_is_routed_by_its_own_logits(name: str, dtype: torch.dtype) -> None:
    logits, bias, routing = rule_inputs(name, 6)
    weights, expert_ids = route(logits.to(dtype), bias, routing)
    assert weights.dtype == torch.float32 and expert_ids.dtype == torch.int32
    biases = [0.0] * logits.shape[1] if bias is None else bias.tolist()
    for row, weight, ids in zip(logits.tolist(), weights, expert_ids, strict=True):
        want = route_token(row, biases, routing)
        assert ids.tolist() == list(want)
        torch.testing.assert_close(weight, torch.tensor(list(want.values())))


@pytest.mark.parametrize("name", RULES)
def test_a_token_has_the_bits_that_it_has_alone(name: str) -> None:
    _, bias, routing = rule_inputs(name, 1)
    logits = torch.randn(50, RULES[name][0])
    together = route(logits, bias, routing)
    for token in range(50):
        for whole, alone in zip(together, route(logits[token : token + 1], bias, routing), strict=True):
            assert torch.equal(whole[token], alone[0])


def test_scores_that_vanish_divide_by_the_least_sum() -> None:
    logits = torch.tensor([[-200.0, -200.0, -201.0]])
    routing = Routing(2, scores="sigmoid", has_bias=True, least_sum=1e-20)
    weights, _ = route(logits, torch.zeros(3), routing)
    assert weights.tolist() == [[0.0, 0.0]]
