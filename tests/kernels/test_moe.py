"""What a mixture of experts means, against the plainest way to write it, and the ordering by expert by its rules."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.moe import align_reference, fused_experts, num_blocks
from nanovllm.kernels.routing import Routing, route
from nanovllm.kernels.silu_and_mul import silu_and_mul_reference


def random_ids(num_tokens: int, top_k: int, num_experts: int) -> Tensor:
    return torch.rand(num_tokens, num_experts).topk(top_k).indices.int()


def check_order(expert_ids: Tensor, num_experts: int, block_size: int, rows: Tensor, block_experts: Tensor) -> None:
    """Every choice stands once, in order, in blocks of its expert alone; experts ascend; the rest is padding."""
    flat, num_rows = expert_ids.flatten().tolist(), expert_ids.numel()
    used = block_experts >= 0
    assert not used[int(used.sum()) :].any()
    experts = block_experts[used].tolist()
    assert experts == sorted(experts)
    for expert in range(num_experts):
        blocks = rows[block_experts == expert]
        mine = [row for row, chosen in enumerate(flat) if chosen == expert]
        assert len(blocks) == -(-len(mine) // block_size)
        assert blocks.flatten().tolist() == mine + [num_rows] * (blocks.numel() - len(mine))


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 40])
@pytest.mark.parametrize(("num_experts", "top_k", "block_size"), [(1, 1, 16), (3, 2, 4), (64, 8, 16), (5, 5, 16)])
def test_align(num_tokens: int, num_experts: int, top_k: int, block_size: int) -> None:
    torch.manual_seed(num_tokens)
    expert_ids = random_ids(num_tokens, top_k, num_experts)
    rows, block_experts = align_reference(expert_ids, num_experts, block_size)
    assert rows.shape == (num_blocks(expert_ids.numel(), num_experts, block_size), block_size)
    check_order(expert_ids, num_experts, block_size, rows, block_experts)


def test_align_example() -> None:
    """The one in the docstring."""
    rows, block_experts = align_reference(torch.tensor([[2, 0], [2, 1]], dtype=torch.int32), 3, 2)
    assert rows.tolist() == [[1, 4], [3, 4], [0, 2]] and block_experts.tolist() == [0, 1, 2]


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_number_of_blocks_is_the_most_that_can_be_needed(block_size: int) -> None:
    """No distribution of rows over experts needs more, and one needs as many."""
    for num_experts in range(1, 5):
        for num_rows in range(1, 40):
            worst = [1] * min(num_rows, num_experts)
            worst[0] += num_rows - len(worst)
            needed = sum(-(-size // block_size) for size in worst)
            assert needed == num_blocks(num_rows, num_experts, block_size)


@pytest.mark.parametrize(("num_tokens", "top_k"), [(0, 2), (1, 1), (9, 2), (4, 5)])
def test_experts_equal_a_loop_over_tokens(num_tokens: int, top_k: int) -> None:
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(num_tokens, 12), torch.randn(5, 14, 12), torch.randn(5, 12, 7)
    weights, expert_ids = route(torch.randn(num_tokens, 5), None, Routing(top_k))
    before = x.clone()
    got = fused_experts(x, gate_up, down, weights, expert_ids)
    want = torch.zeros(num_tokens, 12)
    for token in range(num_tokens):
        for weight, expert in zip(weights[token], expert_ids[token], strict=True):
            hidden = silu_and_mul_reference(F.linear(x[token], gate_up[expert]))
            want[token] += weight * F.linear(hidden, down[expert])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    assert torch.equal(x, before)
