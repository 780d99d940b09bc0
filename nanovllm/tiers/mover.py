"""TierMover: a worker's blocks between its KV cache, host memory and files, before each step.

Owns what the host keeps and the buffers on the way; files are `block_files.py`'s and `warm_blocks.py`'s. What moves is
the plan's (`tiered_cache.py`). Invariant: everything on the device happens in the order of the stream that steps run
on, or behind an event of it; so no step reads a block before it is whole, and none writes one before it is copied.

On a GPU bytes travel on a stream of their own, through a few buffers of `_BUFFER_BYTES`: they come from the host while
the step before still runs, and are then spread over the layers in the order of steps. A block's bytes lie together:
layer by layer, its part of each tensor of the layer's cache.
"""

import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovllm.config import ResolvedConfig
from nanovllm.engine.interfaces import PendingStep
from nanovllm.engine.scheduler_output import BlockMoves, SchedulerOutput
from nanovllm.kernels.attention_types import LayerCache
from nanovllm.runner.kv_cache import MakeZeros, zeros
from nanovllm.tiers.block_files import BlockFiles
from nanovllm.tiers.host_memory import host_blocks
from nanovllm.tiers.store import open_folders
from nanovllm.tiers.warm_blocks import WarmBlocks

_BUFFER_BYTES = 64 * 2**20
_NUM_BUFFERS = 4
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class Parts:
    """A block's bytes in the caches of all layers. num_bytes: of one block."""

    def __init__(self, caches: Sequence[LayerCache]) -> None:
        self._parts: list[tuple[Tensor, int, int]] = []  # a tensor whose first dimension is the block; its bytes
        start = 0
        for cache in caches:
            for tensor in (cache.data.transpose(0, 1), *(one for one in cache[1:] if one is not None)):
                tensor = _as_words(tensor)
                end = start + prod(tensor.shape[1:]) * tensor.element_size()
                self._parts.append((tensor, start, end))
                start = end
        self.num_bytes = start

    def gather(self, block_ids: Tensor, into: Tensor) -> None:
        """into: uint8 [num_blocks, num_bytes]."""
        for tensor, lane in self._lanes(into):
            lane.copy_(tensor[block_ids])

    def spread(self, block_ids: Tensor, source: Tensor) -> None:
        for tensor, lane in self._lanes(source):
            tensor[block_ids] = lane

    def _lanes(self, buffer: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for tensor, start, end in self._parts:
            yield tensor, buffer[:, start:end].view(tensor.dtype).view(-1, *tensor.shape[1:])


def _as_words(tensor: Tensor) -> Tensor:
    """The same memory in whole numbers, as wide as they fit: not all codes can be indexed, and bytes would be slow."""
    num_bytes = tensor.shape[-1] * tensor.element_size()
    return tensor.view(next(word for word in _WORDS if num_bytes % word.itemsize == 0))


class TierMover:
    """num_slots: blocks of host memory. folder: of this rank's files, None without a store; its files have store_bytes
    at most, for a while. warm_bytes: of host memory for those that were used last. make: the device's memory.
    """

    def __init__(
        self,
        caches: Sequence[LayerCache],
        num_slots: int,
        folder: Path | None,
        store_bytes: int,
        warm_bytes: int,
        device: torch.device,
        make: MakeZeros = zeros,
    ) -> None:
        self._parts = Parts(caches)
        self._device = device
        self._on_gpu = device.type == "cuda"
        num_bytes = self._parts.num_bytes
        self._slots = host_blocks(num_slots, num_bytes, device)
        self._at_once = max(1, _BUFFER_BYTES // num_bytes)
        count = _NUM_BUFFERS if self._on_gpu else 1
        self._buffers = [make((self._at_once, num_bytes), torch.uint8, device) for _ in range(count)]
        self._next = 0
        if self._on_gpu:
            self._side = torch.cuda.Stream(device)
            self._is_free = [torch.cuda.Event() for _ in self._buffers]
        self._files, self._warm = None, None
        if folder is not None:
            self._read = [host_blocks(self._at_once, num_bytes, device) for _ in range(count)]
            self._files = BlockFiles(folder, store_bytes)
            if warm_bytes >= num_bytes:
                self._warm = WarmBlocks(self._files, num_bytes, warm_bytes, device)

    def move(self, moves: BlockMoves) -> None:
        for some in self._some(moves.keeps):
            self._keep(some)
        for some in self._some(moves.saves):
            self._copy_out([block_id for block_id, _ in some], [self._slots[slot] for _, slot in some])
        for some in self._some(moves.loads):
            self._copy_in([block_id for block_id, _ in some], [self._slots[slot] for _, slot in some])
        if moves.fetches:
            self._fetch(moves.fetches)

    def _some(self, moves: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """As many at a time as a buffer holds."""
        return (moves[i : i + self._at_once] for i in range(0, len(moves), self._at_once))

    def _copy_out(self, block_ids: list[int], targets: Sequence[Tensor]) -> "torch.cuda.Event | None":
        """Into the host's memory; the event comes when it is there."""
        ids = torch.tensor(block_ids, device=self._device)
        index = self._turn()
        buffer = self._buffers[index]
        if not self._on_gpu:
            self._parts.gather(ids, buffer[: len(ids)])
            for row, target in zip(buffer, targets, strict=False):
                target.copy_(row)
            return None
        steps = torch.cuda.current_stream(self._device)
        steps.wait_event(self._is_free[index])
        self._parts.gather(ids, buffer[: len(ids)])
        self._side.wait_stream(steps)
        with torch.cuda.stream(self._side):
            for row, target in zip(buffer, targets, strict=False):
                target.copy_(row, non_blocking=True)
        self._is_free[index].record(self._side)
        arrived = torch.cuda.Event()
        arrived.record(self._side)
        return arrived

    def _copy_in(self, block_ids: list[int], sources: Sequence[Tensor]) -> None:
        ids = torch.tensor(block_ids, device=self._device)
        index = self._turn()
        buffer = self._buffers[index]
        if not self._on_gpu:
            for row, source in zip(buffer, sources, strict=False):
                row.copy_(source)
            self._parts.spread(ids, buffer[: len(ids)])
            return
        steps = torch.cuda.current_stream(self._device)
        self._side.wait_event(self._is_free[index])
        with torch.cuda.stream(self._side):
            for row, source in zip(buffer, sources, strict=False):
                row.copy_(source, non_blocking=True)
        steps.wait_stream(self._side)
        self._parts.spread(ids, buffer[: len(ids)])
        self._is_free[index].record(steps)

    def _turn(self) -> int:
        self._next = (self._next + 1) % len(self._buffers)
        return self._next

    # -- files --

    def _keep(self, some: Sequence[tuple[int, bytes]]) -> None:
        assert self._files is not None
        shape = len(some), self._parts.num_bytes
        copy = torch.empty(shape, dtype=torch.uint8, pin_memory=self._on_gpu)
        arrived = self._copy_out([block_id for block_id, _ in some], list(copy))
        self._files.write([block_hash for _, block_hash in some], copy, arrived)

    def _fetch(self, fetches: Sequence[tuple[int, bytes]]) -> None:
        """What is in host memory goes first; threads read files meanwhile, some buffers ahead of what is copied."""
        warm = [None if self._warm is None else self._warm.find(block_hash) for _, block_hash in fetches]
        cold = [fetch for fetch, row in zip(fetches, warm, strict=True) if row is None]
        ready = [(block_id, row) for (block_id, _), row in zip(fetches, warm, strict=True) if row is not None]
        parts = list(self._some(cold))
        reads: list[list[Future[None]]] = []
        copied: list[torch.cuda.Event] = []

        def read_ahead(number: int) -> None:
            while len(reads) < min(len(parts), number + len(self._read)):
                if len(reads) >= len(self._read) and self._on_gpu:
                    copied[len(reads) - len(self._read)].synchronize()  # its buffer is read into again
                reads.append(self._begin_reading(parts[len(reads)], self._read[len(reads) % len(self._read)]))

        read_ahead(0)
        for some in self._some(ready):
            self._copy_in([block_id for block_id, _ in some], [row for _, row in some])
        for number, part in enumerate(parts):
            read_ahead(number)
            for read in reads[number]:
                read.result()
            self._copy_in([block_id for block_id, _ in part], self._read[number % len(self._read)])
            if self._on_gpu:
                copied.append(self._side.record_event())

    def _begin_reading(self, part: Sequence[tuple[int, bytes]], into: Sequence[Tensor]) -> "list[Future[None]]":
        assert self._files is not None
        return [
            self._files.begin_reading(block_hash, row.numpy()) for (_, block_hash), row in zip(part, into, strict=False)
        ]

    def close(self) -> None:
        """Return when all is written that was to be kept."""
        if self._files is not None:
            self._files.close()


def with_tiers(
    runner: Any,
    caches: Sequence[LayerCache],
    config: ResolvedConfig,
    model: Path,
    num_slots: int,
    rank: int,
    make: MakeZeros,
) -> "MovingRunner":
    """caches: of each layer. model: where its checkpoint is. num_slots: blocks of host memory. rank: this worker's,
    which its folder is named by. make: as of `TierMover`.
    """
    folder = None if config.prefix_store is None else open_folders(config, model)[rank]
    store_bytes, warm_bytes = int(config.prefix_store_gb * 2**30), int(config.prefix_store_warm_gb * 2**30)
    if runner.device.type != "cuda":
        warm_bytes = 0  # the page cache is as near
    sizes = num_slots, folder, store_bytes, warm_bytes
    return MovingRunner(runner, TierMover(caches, *sizes, runner.device, make))


class MovingRunner:
    """A runner that moves blocks before a step, where its plan says so."""

    def __init__(self, runner: Any, mover: TierMover) -> None:
        self._runner, self._mover = runner, mover
        weakref.finalize(self, mover.close)  # executors let go of a runner, and that is its end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)  # for whoever asks the worker for something else than a step

    @torch.inference_mode()
    def execute(self, plan: SchedulerOutput) -> PendingStep:
        if plan.moves is not None:
            self._mover.move(plan.moves)
        return self._runner.execute(plan)
