"""Sleepers: the memory of a worker that sleeps, given back to the device and taken again, piece by piece.

Owns weights, slots of adapters and caches as memory; what they hold is others' business. On a GPU they lie in regions
that keep their addresses (`virtual_memory.py`), so captured graphs, kernels and views go on behind a sleep as if there
had been none. On a CPU the pages are given back to the operating system. Invariant: what was given back reads as zero,
or as it was where it was saved, once it is taken again.
"""

import ctypes
import mmap
from collections.abc import Collection, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from nanovllm.layers.linear import LinearBase
from nanovllm.runner.kv_cache import zeros

if TYPE_CHECKING:
    from nanovllm.runner.virtual_memory import Region

_BYTES_OF_REGION = 256 * 2**20  # of weights, moved together: so much more than the weights is taken at a time


class Sleeper(Protocol):
    def hold_weights(self, model: Any, are_updated: bool = True) -> None:
        """The parameters, once they are loaded and before anybody has remembered where they are. are_updated: new ones
        can be given behind a sleep; those of a draft cannot, so they are saved whatever becomes of the model's.
        """
        ...

    def hold_slots(self, stacks: Sequence[Tensor]) -> None:
        """What goes with the weights, before anybody has a view of it; its owner fills it again, so it is not saved."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A part of the KV cache, or of what else holds only what can be computed again."""
        ...

    def sleep(self, keeps_weights: bool) -> None:
        """Give back the KV cache, and the weights; keeps_weights: with what they hold saved in the host's memory.

        What is given back already stays as it is.
        """
        ...

    def wake(self, tags: Collection[str]) -> None:
        """Take back the "weights", the "kv_cache", or both. Raises torch.OutOfMemoryError: then nothing is taken."""
        ...


class HostSleeper:
    """On a CPU, where weights that are kept stay where they are."""

    def __init__(self) -> None:
        self._model: Any = None
        self._caches: list[Tensor] = []

    def hold_weights(self, model: Any, are_updated: bool = True) -> None:
        if are_updated:
            self._model = model

    def hold_slots(self, stacks: Sequence[Tensor]) -> None:
        self._caches.extend(stacks)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        cache = zeros(shape, dtype, device)
        self._caches.append(cache)
        return cache

    def sleep(self, keeps_weights: bool) -> None:
        for cache in self._caches:
            _give_back(cache)
        if not keeps_weights and self._model is not None:
            for module in self._model.modules():
                if isinstance(module, LinearBase):
                    module.method.discard()
            for parameter in self._model.parameters():
                _give_back(parameter)

    def wake(self, tags: Collection[str]) -> None:
        """Nothing: pages come when they are written."""


def _give_back(tensor: Tensor) -> None:
    """The pages that hold nothing but this contiguous tensor; it reads as zero then."""
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if first >= last:
        tensor.detach().zero_()
        return
    ctypes.memset(start, 0, first - start)
    ctypes.memset(last, 0, end - last)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if libc.madvise(first, last - first, mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise failed")


class GpuSleeper:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._weights: list[Region] = []
        self._drafts: list[Region] = []  # weights that are always saved
        self._slots: list[Region] = []
        self._caches: list[Region] = []
        self._saved: dict[Region, Tensor] = {}  # on the host: what regions held that have been given back

    def hold_weights(self, model: Any, are_updated: bool = True) -> None:
        parameters = list(dict.fromkeys(model.parameters()))
        self._move(parameters, self._weights if are_updated else self._drafts)

    def hold_slots(self, stacks: Sequence[Tensor]) -> None:
        self._move(stacks, self._slots)

    def _move(self, tensors: Sequence[Tensor], regions: "list[Region]") -> None:
        """Into regions, a few tensors at a time, so that they never take twice their memory."""
        group: list[Tensor] = []
        for tensor in tensors:
            group.append(tensor)
            if sum(one.nbytes for one in group) >= _BYTES_OF_REGION:
                regions.append(self._region_of(group))
                group = []
        if group:
            regions.append(self._region_of(group))

    def _region_of(self, tensors: list[Tensor]) -> "Region":
        from nanovllm.runner.virtual_memory import Region, size_of, tensors_in

        shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        torch.cuda.empty_cache()  # what the last ones lay in
        region = Region(size_of(shapes), self._device)
        for tensor, place in zip(tensors, tensors_in(region, shapes), strict=True):
            tensor.data = place.copy_(tensor.detach())
        torch.cuda.synchronize(self._device)
        return region

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        from nanovllm.runner.virtual_memory import Region, tensors_in

        region = Region(prod(shape) * dtype.itemsize, self._device)
        self._caches.append(region)
        (cache,) = tensors_in(region, [(shape, dtype)])
        return cache.zero_()

    def sleep(self, keeps_weights: bool) -> None:
        for region in (*self._drafts, *(self._weights if keeps_weights else ())):
            if region.is_mapped:
                self._saved[region] = _saved(region.tensor())
        for region in (*self._weights, *self._drafts, *self._slots, *self._caches):
            region.unmap()
        torch.cuda.empty_cache()

    def wake(self, tags: Collection[str]) -> None:
        torch.cuda.empty_cache()
        regions = [*self._weights, *self._drafts, *self._slots] if "weights" in tags else []
        regions += self._caches if "kv_cache" in tags else []
        taken = [region for region in regions if not region.is_mapped]
        try:
            for region in taken:
                region.map()
        except torch.OutOfMemoryError:
            for region in taken:
                region.unmap()
            raise
        for region in taken:
            saved = self._saved.pop(region, None)
            region.tensor().zero_() if saved is None else region.tensor().copy_(saved)
        torch.cuda.synchronize(self._device)


def _saved(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def choose_sleeper(device: torch.device, enable_sleep_mode: bool) -> Sleeper | None:
    """None where memory cannot be given back: on a GPU, unless it was asked for."""
    if device.type == "cpu":
        return HostSleeper()
    return GpuSleeper(device) if enable_sleep_mode else None
