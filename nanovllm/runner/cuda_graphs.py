"""DecodeGraphs: a decode step captured once per batch size, and replayed as one launch.

Owns the sizes, the static inputs and the captured graphs. A step of n single-token requests runs in the graph of the next
size up; the rows between are padding (-1), which reads nothing, stores nothing and is never sampled.

Invariant: a graph reads only device memory that outlives it (weights, KV cache, batch state, its static inputs), so one
capture serves every later step of its size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class DecodeInputs:
    """What a decode step is told, int32: rows [size], -1 for padding; token_ids [size], -1 for the last sampled one."""

    rows: Tensor
    token_ids: Tensor
    query_start_loc: Tensor  # [size + 1]


@dataclass(frozen=True)
class DecodeOutputs:
    logits: Tensor  # [size, vocab_size]
    seq_lens: Tensor  # [size]


DecodeStep = Callable[[DecodeInputs], DecodeOutputs]


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: close together where a step is short, and never more than an eighth of padding above 64."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 32, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class DecodeGraphs:
    """step: runs a decode step eagerly. Captures the largest size at once, so that the others fit into its memory pool,
    and every other when it is first needed."""

    def __init__(self, step: DecodeStep, max_num_seqs: int, num_buffers: int, device: torch.device) -> None:
        self._step = step
        self._sizes = graph_sizes(max_num_seqs)
        self._static = torch.full((2 * max_num_seqs,), -1, dtype=torch.int32, device=device)
        self._starts = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._staging = [torch.empty(2 * max_num_seqs, dtype=torch.int32, pin_memory=True) for _ in range(num_buffers)]
        self._next = 0
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, DecodeOutputs]] = {}
        self._capture(max_num_seqs)

    def run(self, rows: np.ndarray, token_ids: np.ndarray) -> DecodeOutputs:
        """Queue one decode step for rows [n] with token_ids [n]; returns the outputs of these n, valid until the next run."""
        num_reqs = len(rows)
        size = next(size for size in self._sizes if size >= num_reqs)
        if size not in self._graphs:
            self._capture(size)
        staging = self._staging[self._next]
        self._next = (self._next + 1) % len(self._staging)
        packed = staging.numpy()[: 2 * size]
        packed.fill(-1)
        packed[:num_reqs] = rows
        packed[size : size + num_reqs] = token_ids
        self._static[: 2 * size].copy_(staging[: 2 * size], non_blocking=True)
        graph, outputs = self._graphs[size]
        graph.replay()
        return DecodeOutputs(outputs.logits[:num_reqs], outputs.seq_lens[:num_reqs])

    def _capture(self, size: int) -> None:
        inputs = DecodeInputs(self._static[:size], self._static[size : 2 * size], self._starts[: size + 1])
        self._static.fill_(-1)  # padding only: capturing must not advance any request
        self._step(inputs)  # compiles what this size needs
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = self._step(inputs)
        self._graphs[size] = graph, outputs
