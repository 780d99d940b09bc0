"""DecodeGraphs: a decode step captured once per batch size, and replayed as one launch.

Owns the sizes, the static inputs and the captured graphs. A step of n single-token requests runs in the graph of the
next size up; the rows between are padding (-1), which reads nothing, stores nothing, and whose token nobody looks at.

Invariant: a graph reads only device memory that outlives it (weights, KV cache, batch state, its static inputs), so one
capture serves every later step of its size.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class DecodeInputs(NamedTuple):
    """What a decode step is told, each [size] int32."""

    rows: Tensor  # -1: padding
    token_ids: Tensor  # -1: the row's last sampled token
    new_places: Tensor  # where in the flat block tables a new block goes; padding points behind them
    new_blocks: Tensor  # the block


DecodeStep = Callable[[DecodeInputs, Tensor], Tensor]  # (inputs, query_start_loc [size + 1]) -> tokens [size]
_FIELDS = len(DecodeInputs._fields)


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: close together where a step is short, and at most an eighth of padding above 64."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 32, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class DecodeGraphs:
    """Captures the largest size at once, so that all others fit into its memory pool, and those when first needed.

    step: runs a decode step eagerly. nowhere: a place behind the block tables that may be written.
    """

    def __init__(
        self, step: DecodeStep, max_num_seqs: int, nowhere: int, num_buffers: int, device: torch.device
    ) -> None:
        self._step = step
        self._nowhere = nowhere
        self._sizes = graph_sizes(max_num_seqs)
        self._static = torch.empty(_FIELDS * max_num_seqs, dtype=torch.int32, device=device)
        self._starts = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._staging = [
            torch.empty(_FIELDS * max_num_seqs, dtype=torch.int32, pin_memory=True) for _ in range(num_buffers)
        ]
        self._next = 0
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._capture(max_num_seqs)

    def run(self, rows: Sequence[int], token_ids: Sequence[int], new_blocks: Sequence[tuple[int, int]]) -> Tensor:
        """Queue one decode step; new_blocks: (place, block). Returns tokens [len(rows)], valid until the next run."""
        size = next(size for size in self._sizes if size >= len(rows))
        if size not in self._graphs:
            self._capture(size)
        self._upload(size, rows, token_ids, new_blocks)
        graph, tokens = self._graphs[size]
        graph.replay()
        return tokens[: len(rows)]

    def _upload(
        self, size: int, rows: Sequence[int], token_ids: Sequence[int], new_blocks: Sequence[tuple[int, int]]
    ) -> None:
        staging = self._staging[self._next]
        self._next = (self._next + 1) % len(self._staging)
        fields = staging.numpy()[: _FIELDS * size].reshape(_FIELDS, size)
        fields.fill(-1)
        fields[2].fill(self._nowhere)
        fields[0, : len(rows)] = rows
        fields[1, : len(token_ids)] = token_ids
        if new_blocks:
            fields[2, : len(new_blocks)], fields[3, : len(new_blocks)] = zip(*new_blocks, strict=True)
        self._static[: _FIELDS * size].copy_(staging[: _FIELDS * size], non_blocking=True)

    def _capture(self, size: int) -> None:
        self._upload(size, (), (), ())  # padding only: capturing must not advance any request
        inputs = DecodeInputs(*self._static[: _FIELDS * size].view(_FIELDS, size))
        starts = self._starts[: size + 1]
        self._step(inputs, starts)  # compiles what this size needs
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            tokens = self._step(inputs, starts)
        self._graphs[size] = graph, tokens
