"""Routing in a mixture of experts (Shazeer et al., 2017): which experts a token goes through, and with which weights.

Owns the rules that families have for it, as data, and their meaning. Does not own the router's product
(`layers/experts.py`), nor what the experts compute (`moe.py`). Invariant: pure; each token is routed by its own logits.

    logits --softmax or sigmoid--> scores --+ bias--> what is compared: the best groups, and in them the best experts
                                   scores of those --sum to one--> --times scale--> weights

The bias only balances the experts' loads: it changes who is chosen, never a weight (Wang et al., 2024). Groups are
DeepSeek-V3's (2024), for experts that are spread over machines.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.dispatch import use_triton


class Routing(NamedTuple):
    """top_k: experts of a token. renormalize: their weights sum to one, before they are multiplied by `scale`.

    has_bias: scores are compared with a number added for each expert. num_groups: of equal size, of neighbouring
    experts; only those of the `top_groups` best groups are compared. group_judges: how many of its best experts say,
    together, how good a group is: 1 or 2. least_sum: what renormalizing divides by at least.
    """

    top_k: int
    renormalize: bool = True
    scores: str = "softmax"  # or "sigmoid"
    has_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_judges: int = 2
    scale: float = 1.0
    least_sum: float = 0.0


def route(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """The experts of each token. logits [num_tokens, num_experts], any float dtype; bias float32 [num_experts].

    Returns (weights float32, expert_ids int32), both [num_tokens, top_k], the best score, with its bias, first.
    """
    if use_triton(logits):
        from nanovllm.kernels.triton.routing import route_triton

        return route_triton(logits, bias, routing)
    return route_reference(logits, bias, routing)


def route_reference(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    scores = sigmoid(logits) if routing.scores == "sigmoid" else logits.softmax(dim=-1, dtype=torch.float32)
    compared = scores if bias is None else scores + bias
    if routing.top_groups < routing.num_groups:
        compared = _in_best_groups(compared, routing)
    best, expert_ids = compared.topk(routing.top_k, dim=-1)
    weights = best if compared is scores else scores.gather(1, expert_ids)
    if routing.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=routing.least_sum)
    return weights * routing.scale, expert_ids.int()


def sigmoid(x: Tensor) -> Tensor:
    """float32. Each number has the bits that it has alone: on a CPU, PyTorch's own has another formula for the numbers
    that are left over of its vectors, so a token's would depend on how many stand beside it.
    """
    if x.is_cuda:
        return x.float().sigmoid()
    return torch.stack((x, torch.zeros_like(x)), dim=-1).softmax(dim=-1, dtype=torch.float32)[..., 0]


def _in_best_groups(compared: Tensor, routing: Routing) -> Tensor:
    """-inf for the experts of all other groups."""
    groups = compared.unflatten(-1, (routing.num_groups, -1))
    goodness = groups.topk(routing.group_judges, dim=-1).values.sum(dim=-1)
    best = goodness.topk(routing.top_groups, dim=-1).indices
    is_left_out = torch.ones(groups.shape[:-1], dtype=torch.bool, device=compared.device).scatter_(1, best, False)
    return groups.masked_fill(is_left_out[..., None], float("-inf")).flatten(-2)
