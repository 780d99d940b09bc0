"""The Triton products of adapters against their reference: few rows and many, odd sizes, gates, and CUDA graphs."""

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import lora
from nanovllm.kernels.lora import AdapterRows
from nanovllm.kernels.moe import align_reference
from nanovllm.kernels.silu_and_mul import GATES
from nanovllm.kernels.triton.linear.skinny_gemv import GemvConfig
from tests.kernels.twins import DEVICE, DTYPES, INTERPRETED, TOLERANCE, load_twin, randn, relative_error, twin_test

twin = load_twin("lora")
pytestmark = twin_test

NUM_SLOTS = 3
# rows, sizes of the matrices, inputs, rank
SIZES = [(1, (48,), 32, 16), (3, (32, 16, 16), 300, 16), (20, (96, 96), 1700, 48), (70, (200, 40, 40), 96, 32)]


def make_rows(slots: Tensor, block_size: int = 16, is_fixed: bool = False) -> AdapterRows:
    semaphores = torch.zeros(4096, dtype=torch.int32, device=DEVICE)
    if len(slots) <= lora.MAX_SINGLE_ROWS and not is_fixed:
        return AdapterRows(slots, NUM_SLOTS, None, slots)
    return AdapterRows(slots, NUM_SLOTS, *align_reference(slots, NUM_SLOTS + 1, block_size), is_fixed, semaphores)


def make_case(size: tuple[int, tuple[int, ...], int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    num_rows, sizes, inputs, rank = size
    x, outputs = randn(num_rows, inputs, dtype=dtype), randn(num_rows, sum(sizes), dtype=dtype)
    a = (randn(NUM_SLOTS, len(sizes) * rank, inputs, dtype=dtype) * inputs**-0.5).contiguous()
    b, bias = randn(NUM_SLOTS, sum(sizes), rank, dtype=dtype) * 0.3, randn(NUM_SLOTS, sum(sizes), dtype=dtype)
    slots = (torch.arange(num_rows, dtype=torch.int32) * 7 % (NUM_SLOTS + 1)).to(DEVICE)
    return x, outputs, a, b, bias, slots


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_equal_the_reference(dtype: torch.dtype, size: tuple[int, tuple[int, ...], int, int]) -> None:
    torch.manual_seed(0)
    x, outputs, a, b, bias, slots = make_case(size, dtype)
    slots += len(slots) == 1  # any adapter
    rows, wanted_rows = make_rows(slots, 32 if size[0] == 70 else 16), lora.by_slot(slots, NUM_SLOTS)
    want = lora.expand_reference(
        outputs.clone(), lora.shrink_reference(x, a, wanted_rows), b, bias, size[1], wanted_rows
    )
    shrunk = twin.shrink_triton(x, a, rows)
    assert rows.semaphores is None or not rows.semaphores.any(), "counters are 0 between calls"
    got = twin.expand_triton(outputs.clone(), shrunk, b, bias, size[1], rows)
    if rows.semaphores is not None:
        parts = twin.shrink_triton(x, a, rows._replace(semaphores=None))
        apart = twin.expand_triton(outputs.clone(), parts, b, bias, size[1], rows)
        assert relative_error(got, apart) < TOLERANCE[dtype]
    assert relative_error(got, want) < TOLERANCE[dtype]
    without = slots == NUM_SLOTS
    assert torch.equal(got[without], outputs[without])
    if len(size[1]) == 2:
        for activation in ("silu", "gelu_tanh"):
            gated = twin.expand_triton(outputs.clone(), shrunk, b, bias, size[1], rows, activation)
            assert relative_error(gated, GATES[activation](want)) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("inputs", "config"),
    [(512, GemvConfig(8, 4, 1)), (700, GemvConfig(4, 4, 8)), (4500, GemvConfig(4, 4, 2, chunk=1024))],
)
def test_one_row_is_shrunk_beside_the_product(dtype: torch.dtype, inputs: int, config: GemvConfig) -> None:
    torch.manual_seed(0)
    x, _, a, _, bias, _ = make_case((1, (32, 16), inputs, 16), dtype)
    weight = randn(48, inputs, dtype=dtype) * inputs**-0.5
    for slot in range(NUM_SLOTS + 1):
        slots = torch.full((1,), slot, dtype=torch.int32, device=DEVICE)
        product, shrunk = twin.linear_and_shrink_triton(x, weight, bias[0], a, make_rows(slots), config)
        assert relative_error(product, torch.nn.functional.linear(x, weight, bias[0])) < TOLERANCE[dtype]
        if slot < NUM_SLOTS:
            want = lora.shrink_reference(x, a, lora.by_slot(slots, NUM_SLOTS))
            assert relative_error(shrunk, want) < TOLERANCE[dtype]


def test_in_fixed_order_a_row_is_the_same_in_any_batch() -> None:
    torch.manual_seed(0)
    x, outputs, a, b, bias, slots = make_case((40, (64,), 600, 16), torch.float32)
    several = []
    for chosen in (slice(0, 40), slice(0, 1), slice(0, 9)):
        rows = make_rows(slots[chosen], is_fixed=True)
        shrunk = twin.shrink_triton(x[chosen], a, rows)
        several.append(twin.expand_triton(outputs[chosen].clone(), shrunk, b, bias, (64,), rows)[0])
    assert torch.equal(several[0], several[1]) and torch.equal(several[0], several[2])


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("num_rows", [1, 64, 600])
def test_a_captured_graph_follows_its_slots(num_rows: int) -> None:
    x, _, a, b, bias, slots = make_case((num_rows, (512, 512), 1024, 16), torch.bfloat16)
    weight = randn(1024, 1024, dtype=torch.bfloat16) * 1024**-0.5

    def run() -> Tensor:
        rows = lora.adapter_rows(slots, NUM_SLOTS)
        product, shrunk = lora.linear_and_shrink(x, weight, None, a, rows)
        return lora.expand(product, shrunk, b, bias, (512, 512), rows, "silu")

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in range(3):
        torch.manual_seed(seed)
        slots.copy_(torch.randint(NUM_SLOTS + 1, (num_rows,)))
        graph.replay()
        assert torch.equal(out, run())
