"""The one-shot all-reduce: ranks are streams of one GPU, or processes with common memory in Triton's interpreter."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from nanovllm.kernels.all_reduce import OneShotAllReduce, all_reduce_reference
from tests.kernels.ranks import Case, results_of_ranks
from tests.kernels.twins import DEVICE, DTYPES, load_twin, twin_test

load_twin("all_reduce")
pytestmark = twin_test

CASES = [*((2, dtype) for dtype in DTYPES), (3, torch.float16)]  # ranks, dtype
WORDS_BYTES, MAX_BYTES = 2**13, 2**17  # the latter for two ranks


def shapes(dtype: torch.dtype) -> list[tuple[int, int]]:
    """By words and in bulk: less than what a program takes, and what several take, with a rest."""
    wide = dtype == torch.float32
    return [(1, 6), (3, 512), (4, 1000 if wide else 2000), (1, 2), (3, 2048 if wide else 4000)]


def part(rank: int, call: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(100 * call + rank)
    return torch.randn(shape, generator=generator).to(dtype)


def new_memories(size: int) -> list[Tensor]:
    num_bytes = OneShotAllReduce.memory_bytes(size, WORDS_BYTES, MAX_BYTES)
    return [torch.zeros(num_bytes, dtype=torch.uint8, device=DEVICE) for _ in range(size)]


def as_rank(rank: int, memories: Sequence[Tensor]) -> OneShotAllReduce:
    addresses = [memory.data_ptr() for memory in memories]
    return OneShotAllReduce(rank, addresses, DEVICE, memories, WORDS_BYTES, MAX_BYTES)


def add_up(dtype: torch.dtype, all_reduce: OneShotAllReduce, rank: int, call: int) -> list[Tensor]:
    return [all_reduce(part(rank, call, shapes(dtype)[call], dtype).to(DEVICE))]


def test_equals_reference() -> None:
    """To the bit, on every rank, in calls of different sizes that follow each other at once."""
    num_bytes = [OneShotAllReduce.memory_bytes(size, WORDS_BYTES, MAX_BYTES) for size, _ in CASES]
    cases = [
        Case(size, count, as_rank, partial(add_up, dtype), len(shapes(dtype)))
        for (size, dtype), count in zip(CASES, num_bytes, strict=True)
    ]
    for (size, dtype), got in zip(CASES, results_of_ranks(cases), strict=True):
        for call, shape in enumerate(shapes(dtype)):
            want = all_reduce_reference([part(rank, call, shape, dtype) for rank in range(size)])
            assert len(got) == size and all(torch.equal(own[call][0], want) for own in got), (size, dtype, shape)


def test_takes_what_it_can_do() -> None:
    all_reduce = as_rank(0, new_memories(2))
    x = torch.zeros(4, 2048, dtype=torch.float16, device=DEVICE)
    assert all_reduce.takes(x)
    assert all_reduce.takes(x[:1])
    for other in (x[:0], x[:1, :3], x[:, :1024], x.double(), x.int(), torch.cat([x] * 9), x.flatten()[1:3]):
        assert not all_reduce.takes(other)


def test_a_rank_that_is_a_call_ahead() -> None:
    """It has sent for this call and the next one when this rank's programs look for the first time."""
    memories = new_memories(2)
    own, theirs = part(0, 0, (3, 2048), torch.float32), part(1, 0, (3, 2048), torch.float32)
    words, bulk = 2 * 2 * WORDS_BYTES // 4 * 2, 2 * 2 * MAX_BYTES // 4  # in int32, as the module lays them out
    memory = memories[0].view(torch.int32)
    received = memory[words : words + bulk].view(2, 2, -1)[1, 1]  # of odd calls, from rank 1
    received[: theirs.numel()] = theirs.flatten().view(torch.int32).to(DEVICE)
    memory[words + bulk :].view(2, -1)[1] = 2
    got = as_rank(0, memories)(own.to(DEVICE))
    assert torch.equal(got.cpu(), all_reduce_reference([own, theirs]))
