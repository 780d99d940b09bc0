"""Mixture of experts (Shazeer et al., 2017): the gated feed-forward layers of the experts chosen for each token.

Owns its meaning, and the order that puts tokens of one expert side by side. Does not own the choice (`routing.py`).
Invariant: pure and repeatable; each (token, choice) has a row of its own, and a token's rows are added in the order of
its choices, so the result does not depend on timing. On a GPU nothing here waits for the device, so a step can be
captured as a CUDA graph.

    x, expert_ids --align--> rows, block_experts      blocks of rows that share an expert, so that its weights are read
                                                      once for all of them
    rows --gate, up, SiLU--> --down, times weight--> one row per choice --sum--> one row per token
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.dispatch import use_triton
from nanovllm.kernels.routing import sigmoid
from nanovllm.kernels.silu_and_mul import gelu_and_mul_reference, silu_and_mul_reference


class Gate(NamedTuple):
    """How the halves of an expert's first product become one.

    "silu": silu(gate) * up, and "gelu_tanh" likewise. "clamped" (gpt-oss): gate * sigmoid(alpha * gate) * (up + 1), of
    a gate of `limit` at most and an up from -limit to limit. "relu2" (Nemotron 3): relu(x)^2 of a product that has no
    halves.
    """

    activation: str = "silu"
    alpha: float = 1.0
    limit: float = 0.0

    @property
    def num_parts(self) -> int:
        """Of the first product: gate and up, or one."""
        return 1 if self.activation == "relu2" else 2


SILU = Gate()


class Biases(NamedTuple):
    """Of all experts, in the dtype of x: gate_up [num_experts, 2 * intermediate], down [num_experts, hidden]."""

    gate_up: Tensor
    down: Tensor


class Shared(NamedTuple):
    """An expert with a "silu" gate that every token goes through: gate_up [2 * size, hidden], down [hidden, size]."""

    gate_up: Tensor
    down: Tensor


def relu2(x: Tensor) -> Tensor:
    """relu(x)^2 (So et al., 2021)."""
    return F.relu(x).square_()


def fused_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    biases: Biases | None = None,
    gate: Gate = SILU,
    block_size: int | None = None,
    shared: Shared | None = None,
) -> Tensor:
    """The weighted sum of each token's experts: weights * down(silu(gate x) * up x), or what `gate` says.

    x [num_tokens, hidden], contiguous. gate_up [num_experts, 2 * intermediate, hidden], gate first; down [num_experts,
    hidden, intermediate]; both contiguous and of x's dtype. weights, expert_ids [num_tokens, top_k] from `route`.
    Returns [num_tokens, hidden]. Rounds to x's dtype behind the gate and behind the weighting; sums in float32.
    block_size: rows that a program of the GPU multiplies, 16 to 128; None chooses by the number of tokens. With one
    that is given, a token's result is the same to the bit in any batch. shared: its result is rounded and added to the
    sum; of one token, in the same kernels.
    """
    if use_triton(x):
        if len(x) == 1 and block_size is None:
            from nanovllm.kernels.triton.expert_vectors import vector_experts_triton

            return vector_experts_triton(x, gate_up, down, weights, expert_ids, biases, gate, shared)
        from nanovllm.kernels.triton.moe import fused_experts_triton

        mixed = fused_experts_triton(x, gate_up, down, weights, expert_ids, biases, gate, block_size)
    else:
        mixed = fused_experts_reference(x, gate_up, down, weights, expert_ids, biases, gate)
    return mixed if shared is None else mixed + shared_expert_reference(x, shared)


def shared_expert_reference(x: Tensor, shared: Shared) -> Tensor:
    return F.linear(silu_and_mul_reference(F.linear(x, shared.gate_up)), shared.down)


def fused_experts_reference(
    x: Tensor,
    gate_up: Any,
    down: Any,
    weights: Tensor,
    expert_ids: Tensor,
    biases: Biases | None = None,
    gate: Gate = SILU,
    linear: Callable[..., Tensor] = F.linear,
    silu_and_mul: Callable[[Tensor], Tensor] = silu_and_mul_reference,
    gelu_and_mul: Callable[[Tensor], Tensor] = gelu_and_mul_reference,
) -> Tensor:
    """One expert after another, only those that are in use. linear and the others: the operations, in another form, for
    what gate_up and down have for each expert."""
    chosen = torch.empty((*expert_ids.shape, x.shape[1]), dtype=x.dtype, device=x.device)
    for expert in expert_ids.unique().tolist():
        token, choice = (expert_ids == expert).nonzero(as_tuple=True)
        gate_up_bias, down_bias = (None, None) if biases is None else (biases.gate_up[expert], biases.down[expert])
        both = linear(x[token], gate_up[expert], gate_up_bias)
        if gate.activation == "clamped":
            gated = clamped_and_mul(both, gate)
        elif gate.activation == "relu2":
            gated = relu2(both)
        else:
            gated = (silu_and_mul if gate.activation == "silu" else gelu_and_mul)(both)
        hidden = linear(gated, down[expert], down_bias)
        chosen[token, choice] = (hidden.float() * weights[token, choice, None]).to(x.dtype)
    total = torch.zeros_like(x, dtype=torch.float32)
    for rows in chosen.unbind(1):
        total += rows
    return total.to(x.dtype)


def clamped_and_mul(gate_up: Tensor, rule: Gate) -> Tensor:
    """Computes in float32 and rounds once; each number has the bits that it has alone (`routing.sigmoid`)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=rule.limit), up.clamp(-rule.limit, rule.limit)
    return (gate * sigmoid(gate * rule.alpha) * (up + 1)).to(gate_up.dtype)


def num_blocks(num_rows: int, num_experts: int, block_size: int) -> int:
    """Most blocks of `block_size` rows that `num_rows` rows of `num_experts` experts can need, filled or not."""
    return (num_rows + min(num_rows, num_experts) * (block_size - 1)) // block_size


def align(expert_ids: Tensor, num_experts: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Order the choices by expert, each expert's beginning a new block. expert_ids [num_tokens, top_k] int32.

    Returns rows int32 [num_blocks(...), block_size], which names choices (token * top_k + place), in their order within
    an expert, and num_tokens * top_k where a block has no more; and block_experts int32 [num_blocks(...)], -1 for
    blocks that are not needed, whose rows mean nothing. All sizes follow from those of the arguments.

        expert_ids [[2, 0], [2, 1]], block_size 2  ->  rows [[1, 4], [3, 4], [0, 2]], block_experts [0, 1, 2]
    """
    if use_triton(expert_ids):
        from nanovllm.kernels.triton.moe import MAX_ROWS_OF_ALIGN, align_triton

        if expert_ids.numel() <= MAX_ROWS_OF_ALIGN:
            return align_triton(expert_ids, num_experts, block_size)
    return align_reference(expert_ids, num_experts, block_size)


def align_reference(expert_ids: Tensor, num_experts: int, block_size: int) -> tuple[Tensor, Tensor]:
    num_rows, device = expert_ids.numel(), expert_ids.device
    by_expert, order = expert_ids.flatten().sort(stable=True)
    experts = torch.arange(num_experts, dtype=by_expert.dtype, device=device)
    first_row = torch.searchsorted(by_expert, experts)
    end_row = torch.searchsorted(by_expert, experts, right=True)
    sizes = end_row - first_row
    blocks = (sizes + block_size - 1) // block_size
    end_block = blocks.cumsum(0)
    block = torch.arange(num_blocks(num_rows, num_experts, block_size), device=device)
    expert = torch.searchsorted(end_block, block, right=True)
    is_used = expert < num_experts
    expert = expert.clamp(max=num_experts - 1)
    blocks_before = block - (end_block - blocks)[expert]  # of the same expert
    place = (blocks_before * block_size)[:, None] + torch.arange(block_size, device=device)
    index = (first_row[expert][:, None] + place).clamp(max=num_rows - 1)
    rows = torch.where((place < sizes[expert][:, None]) & is_used[:, None], order[index], num_rows)
    return rows.int(), torch.where(is_used, expert, -1).int()
