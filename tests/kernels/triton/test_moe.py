"""The Triton experts against their reference: every block size, sizes that leave remainders, and CUDA graphs."""

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import moe
from nanovllm.kernels.routing import Routing, route, route_reference
from tests.kernels.test_moe import check_order, random_ids
from tests.kernels.twins import DEVICE, DTYPES, INTERPRETED, TOLERANCE, load_twin, randn, relative_error, twin_test

twin, vectors = load_twin("moe"), load_twin("expert_vectors")
pytestmark = twin_test

# tokens, experts, top_k, hidden, intermediate: one token alone, few, so many that blocks of 32, 64 and 128 are used.
SIZES = [
    (0, 4, 2, 32, 32), (1, 8, 3, 80, 40), (5, 9, 2, 144, 272), (33, 4, 2, 48, 80), (90, 3, 2, 64, 40),
    (110, 2, 2, 40, 64),
]  # fmt: skip


def make_experts(num_experts: int, hidden: int, intermediate: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (
        (randn(num_experts, 2 * intermediate, hidden, dtype=dtype) / hidden**0.5).contiguous(),
        (randn(num_experts, hidden, intermediate, dtype=dtype) / intermediate**0.5).contiguous(),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_experts_equal_reference(dtype: torch.dtype, size: tuple[int, int, int, int, int]) -> None:
    torch.manual_seed(0)
    num_tokens, num_experts, top_k, hidden, intermediate = size
    gate_up, down = make_experts(num_experts, hidden, intermediate, dtype)
    x = randn(num_tokens, hidden, dtype=dtype)
    before = x.clone()
    routing = route_reference(randn(num_tokens, num_experts, dtype=dtype), None, Routing(top_k))
    got = twin.fused_experts_triton(x, gate_up, down, *routing)
    want = moe.fused_experts_reference(x, gate_up, down, *routing)
    assert got.shape == want.shape and got.dtype == dtype
    assert relative_error(got, want) < TOLERANCE[dtype]
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 30])
def test_biases_and_a_clamped_gate(dtype: torch.dtype, num_tokens: int) -> None:
    torch.manual_seed(0)
    gate_up, down = make_experts(5, 80, 40, dtype)
    x, logits = 3 * randn(num_tokens, 80, dtype=dtype), randn(num_tokens, 5, dtype=dtype)
    biases = moe.Biases(randn(5, 80, dtype=dtype), randn(5, 80, dtype=dtype))
    more = *route_reference(logits, None, Routing(2)), biases, moe.Gate("clamped", 1.7, 2.0)
    got = twin.fused_experts_triton(x, gate_up, down, *more)
    assert relative_error(got, moe.fused_experts_reference(x, gate_up, down, *more)) < TOLERANCE[dtype]


@pytest.mark.parametrize("num_tokens", [1, 30])
def test_experts_without_a_gate(num_tokens: int) -> None:
    torch.manual_seed(0)
    dtype = DTYPES[-1]
    up, down = make_experts(5, 80, 40, dtype)
    x, logits = randn(num_tokens, 80, dtype=dtype), randn(num_tokens, 5, dtype=dtype)
    more = *route_reference(logits, None, Routing(2)), None, moe.Gate("relu2")
    got = twin.fused_experts_triton(x, up[:, :40].contiguous(), down, *more)
    want = moe.fused_experts_reference(x, up[:, :40], down, *more)
    assert relative_error(got, want) < TOLERANCE[dtype]


def test_sizes_use_every_block_size() -> None:
    used = {twin.choose_block_size(tokens * top_k, experts) for tokens, experts, top_k, _, _ in SIZES if tokens > 1}
    assert used == {16, 32, 64, 128}


# hidden, intermediate, of the shared expert: remainders of chunks; none; one that is more than a chunk
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(80, 40, 0), (272, 48, 96), (48, 272, 528)])
@pytest.mark.parametrize("is_long", [False, True])
def test_one_token_by_vectors(
    dtype: torch.dtype, sizes: tuple[int, int, int], is_long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a shared expert; chunks that warps share, too."""
    torch.manual_seed(0)
    hidden, intermediate, shared_size = sizes
    if is_long:
        monkeypatch.setattr(vectors, "MAX_CHUNKS", 1)
    gate_up, down = make_experts(6, hidden, intermediate, dtype)
    shared = None
    if shared_size:
        shared = moe.Shared(*(matrix[0] for matrix in make_experts(1, hidden, shared_size, dtype)))
    x, logits = randn(1, hidden, dtype=dtype), randn(1, 6, dtype=dtype)
    choice = route_reference(logits, None, Routing(3))
    got = vectors.vector_experts_triton(x, gate_up, down, *choice, shared=shared)
    want = moe.fused_experts_reference(x, gate_up, down, *choice)
    if shared is not None:
        want = want + moe.shared_expert_reference(x, shared)
    assert got.shape == want.shape and relative_error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("gate", [moe.Gate("clamped", 1.7, 2.0), moe.Gate("gelu_tanh"), moe.Gate("relu2")])
@pytest.mark.parametrize("has_biases", [False, True])
def test_gates_and_biases_of_one_token(gate: moe.Gate, has_biases: bool) -> None:
    torch.manual_seed(0)
    dtype = DTYPES[-1]
    gate_up, down = make_experts(5, 80, 40, dtype)
    gate_up = gate_up[:, : 40 * gate.num_parts].contiguous()
    biases = moe.Biases(randn(5, gate_up.shape[1], dtype=dtype), randn(5, 80, dtype=dtype)) if has_biases else None
    more = *route_reference(randn(1, 5, dtype=dtype), None, Routing(2)), biases, gate
    x = 3 * randn(1, 80, dtype=dtype)
    got = vectors.vector_experts_triton(x, gate_up, down, *more)
    assert relative_error(got, moe.fused_experts_reference(x, gate_up, down, *more)) < TOLERANCE[dtype]


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 40])
@pytest.mark.parametrize(("num_experts", "top_k", "block_size"), [(1, 1, 16), (3, 2, 16), (64, 8, 16), (5, 5, 32)])
def test_align(num_tokens: int, num_experts: int, top_k: int, block_size: int) -> None:
    torch.manual_seed(num_tokens)
    expert_ids = random_ids(num_tokens, top_k, num_experts)
    rows, block_experts = twin.align_triton(expert_ids.to(DEVICE), num_experts, block_size)
    check_order(expert_ids, num_experts, block_size, rows.cpu(), block_experts.cpu())


@pytest.mark.parametrize("num_tokens", [2, 17])
def test_a_token_does_not_depend_on_its_neighbours_values(num_tokens: int) -> None:
    """As long as the number of tokens is the same, and so the kernel."""
    torch.manual_seed(0)
    gate_up, down = make_experts(4, 64, 48, torch.float16)
    x, logits = randn(num_tokens, 64, dtype=torch.float16), randn(num_tokens, 4, dtype=torch.float16)
    before = twin.fused_experts_triton(x, gate_up, down, *route_reference(logits, None, Routing(2)))
    x[1:] = float("inf")
    logits[1:] = -logits[1:]
    after = twin.fused_experts_triton(x, gate_up, down, *route_reference(logits, None, Routing(2)))
    assert torch.equal(before[0], after[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_a_given_block_size_a_token_is_the_same_in_any_batch(dtype: torch.dtype) -> None:
    """To the bit, alone and among any number of others."""
    torch.manual_seed(0)
    gate_up, down = make_experts(4, 80, 48, dtype)
    x, logits = randn(90, 80, dtype=dtype), randn(90, 4, dtype=dtype)
    weights, expert_ids = route_reference(logits, None, Routing(2))

    def run(tokens: slice) -> Tensor:
        return twin.fused_experts_triton(x[tokens], gate_up, down, weights[tokens], expert_ids[tokens], block_size=64)

    together = run(slice(None))
    for tokens in (slice(0, 1), slice(5, 6), slice(5, 22), slice(60, 90)):
        assert torch.equal(run(tokens), together[tokens])


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("num_tokens", [1, 8, 64, 512, 600])
def test_a_captured_graph_follows_its_inputs(num_tokens: int) -> None:
    """Nothing of the routing is frozen in a CUDA graph: other tokens, other experts, same graph. 600: PyTorch sorts."""
    gate_up, down = make_experts(128, 256, 96, torch.bfloat16)
    x, logits = randn(num_tokens, 256, dtype=torch.bfloat16), randn(num_tokens, 128, dtype=torch.bfloat16)

    def run() -> Tensor:
        return moe.fused_experts(x, gate_up, down, *route(logits, None, Routing(8)))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(num_tokens, 256))
        logits.copy_(torch.randn(num_tokens, 128))
        graph.replay()
        assert torch.equal(out, run())
        want = moe.fused_experts_reference(x, gate_up, down, *route_reference(logits, None, Routing(8)))
        assert relative_error(out, want) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("num_tokens", [1, 64, 2000])
def test_shape_of_qwen3_30b_a3b(num_tokens: int) -> None:
    gate_up, down = make_experts(128, 2048, 768, torch.bfloat16)
    x = randn(num_tokens, 2048, dtype=torch.bfloat16)
    routing = route(randn(num_tokens, 128, dtype=torch.bfloat16), None, Routing(8))
    got = moe.fused_experts(x, gate_up, down, *routing)
    assert relative_error(got, moe.fused_experts_reference(x, gate_up, down, *routing)) < TOLERANCE[torch.bfloat16]
    assert torch.equal(got, moe.fused_experts(x, gate_up, down, *routing))
