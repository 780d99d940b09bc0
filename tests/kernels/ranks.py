"""Ranks of kernels that write into other ranks' memory: streams of one GPU, or processes with common memory in Triton's
interpreter.
"""

from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor, multiprocessing

from tests.kernels.twins import DEVICE, INTERPRETED, load_twin


class Case(NamedTuple):
    """num_bytes: of a rank's memory. call(make_rank(rank, memories), rank, number): the tensors of one of num_calls.

    Functions are found by name in another process.
    """

    size: int
    num_bytes: int
    make_rank: Callable[[int, Sequence[Tensor]], Any]
    call: Callable[[Any, int, int], Sequence[Tensor]]
    num_calls: int

    def new_memories(self) -> list[Tensor]:
        return [torch.zeros(self.num_bytes, dtype=torch.uint8, device=DEVICE) for _ in range(self.size)]


def results_of_ranks(cases: Sequence[Case]) -> list[list[list[list[Tensor]]]]:
    """For each case what each rank's calls gave; processes serve all cases, one after the other."""
    if not INTERPRETED:
        return [_of_streams(case) for case in cases]
    context = multiprocessing.get_context("spawn")
    memories = [[memory.share_memory_() for memory in case.new_memories()] for case in cases]
    results, processes = [], []
    for rank in range(max(case.size for case in cases)):
        receiver, sender = context.Pipe(duplex=False)
        processes.append(context.Process(target=_run_process, args=(rank, cases, memories, sender), daemon=True))
        results.append(receiver)
        processes[-1].start()
        sender.close()
    got = [
        [[[torch.from_numpy(array) for array in call] for call in receiver.recv()] for receiver in results[: case.size]]
        for case in cases
    ]
    for process in processes:
        process.join()
    return got


def _run_process(rank: int, cases: Sequence[Case], memories: list[list[Tensor]], connection: Connection) -> None:
    load_twin("all_reduce")
    for case, memory in zip(cases, memories, strict=True):
        if rank < case.size:
            made = case.make_rank(rank, memory)
            calls = [case.call(made, rank, number) for number in range(case.num_calls)]
            connection.send([[tensor.numpy() for tensor in tensors] for tensors in calls])


def _of_streams(case: Case) -> list[list[list[Tensor]]]:
    memories = case.new_memories()
    ranks = [(case.make_rank(rank, memories), torch.cuda.Stream()) for rank in range(case.size)]
    torch.cuda.synchronize()
    got: list[list[Sequence[Tensor]]] = [[] for _ in ranks]
    for number in range(case.num_calls):
        for rank, (made, stream) in enumerate(ranks):
            with torch.cuda.stream(stream):
                got[rank].append(case.call(made, rank, number))
    torch.cuda.synchronize()
    return [[[tensor.cpu() for tensor in tensors] for tensors in own] for own in got]
