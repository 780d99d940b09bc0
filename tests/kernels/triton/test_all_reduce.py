"""The one-shot all-reduce: ranks are streams of one GPU, or processes with common memory in Triton's interpreter."""

from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch
from torch import Tensor, multiprocessing

from nanovllm.kernels.all_reduce import OneShotAllReduce, all_reduce_reference
from tests.kernels.twins import DEVICE, DTYPES, INTERPRETED, load_twin, twin_test

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


def run_process(rank: int, memories: list[list[Tensor]], connection: Connection) -> None:
    load_twin("all_reduce")
    for (size, dtype), memory in zip(CASES, memories, strict=True):
        if rank < size:
            all_reduce = as_rank(rank, memory)
            sums = [all_reduce(part(rank, call, shape, dtype)) for call, shape in enumerate(shapes(dtype))]
            connection.send([total.float().numpy() for total in sums])


def sums_of_processes() -> list[list[list[Tensor]]]:
    context = multiprocessing.get_context("spawn")
    memories = [[memory.share_memory_() for memory in new_memories(size)] for size, _ in CASES]
    results, processes = [], []
    for rank in range(max(size for size, _ in CASES)):
        receiver, sender = context.Pipe(duplex=False)
        processes.append(context.Process(target=run_process, args=(rank, memories, sender), daemon=True))
        results.append(receiver)
        processes[-1].start()
        sender.close()
    sums = [
        [[torch.from_numpy(array).to(dtype) for array in receiver.recv()] for receiver in results[:size]]
        for size, dtype in CASES
    ]
    for process in processes:
        process.join()
    return sums


def sums_of_streams(size: int, dtype: torch.dtype) -> list[list[Tensor]]:
    memories = new_memories(size)
    ranks = [(as_rank(rank, memories), torch.cuda.Stream()) for rank in range(size)]
    torch.cuda.synchronize()
    sums: list[list[Tensor]] = [[] for _ in ranks]
    for call, shape in enumerate(shapes(dtype)):
        for rank, (all_reduce, stream) in enumerate(ranks):
            with torch.cuda.stream(stream):
                sums[rank].append(all_reduce(part(rank, call, shape, dtype).to(DEVICE)))
    torch.cuda.synchronize()
    return [[total.cpu() for total in own] for own in sums]


def test_equals_reference() -> None:
    """To the bit, on every rank, in calls of different sizes that follow each other at once."""
    sums = sums_of_processes() if INTERPRETED else [sums_of_streams(size, dtype) for size, dtype in CASES]
    for (size, dtype), got in zip(CASES, sums, strict=True):
        for call, shape in enumerate(shapes(dtype)):
            want = all_reduce_reference([part(rank, call, shape, dtype) for rank in range(size)])
            assert len(got) == size and all(torch.equal(own[call], want) for own in got), (size, dtype, shape)


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
