"""Sleepers: the memory of a worker that sleeps, given back to the device and taken again, piece by piece.

Owns weights and KV cache as memory; what they hold is others' business. On a GPU both lie in regions that keep their
addresses (`virtual_memory.py`), so captured graphs, kernels and views go on behind a sleep as if nothing had been. On a
CPU the pages are given back to the operating system. Invariant: what was given back reads as zero, or as it was where
it was saved, once it is taken again.
"""

import ctypes
import mmap
from collections.abc import Collection
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from nanovllm.layers.linear import LinearBase
from nanovllm.runner.kv_cache import zeros

_BYTES_OF_REGION = 256 * 2**20  # of weights, moved together: so much more than the weights is taken at a time


class Sleeper(Protocol):
    def hold_weights(self, model: Any) -> None:
        """The parameters, once they are loaded and before anybody has remembered where they are."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A part of the KV cache."""
        ...

    def sleep(self, keeps_weights: bool) -> None:
        """Give back the KV cache, and the weights; keeps_weights: with what they hold saved in the host's memory."""
        ...

    def wake(self, tags: Collection[str]) -> None:
        """Take back the "weights", the "kv_cache", or both. Raises torch.OutOfMemoryError; it may be called again."""
        ...


class HostSleeper:
    """On a CPU, where weights that are kept stay where they are."""

    def __init__(self) -> None:
        self._model: Any = None
        self._caches: list[Tensor] = []

    def hold_weights(self, model: Any) -> None:
        self._model = model

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
        from nanovllm.runner.virtual_memory import Region

        self._device = device
        self._weights: list[Region] = []
        self._caches: list[Region] = []
        self._saved: list[Tensor] = []  # what the regions of the weights hold, on the host

    def hold_weights(self, model: Any) -> None:
        """Move them into regions, a few at a time, so that they never take twice their memory."""
        group: list[torch.nn.Parameter] = []
        for parameter in dict.fromkeys(model.parameters()):
            group.append(parameter)
            if sum(one.nbytes for one in group) >= _BYTES_OF_REGION:
                self._move(group)
                group = []
        self._move(group)

    def _move(self, parameters: list[torch.nn.Parameter]) -> None:
        from nanovllm.runner.virtual_memory import Region, size_of, tensors_in

        if not parameters:
            return
        shapes = [(tuple(parameter.shape), parameter.dtype) for parameter in parameters]
        torch.cuda.empty_cache()  # what the last ones lay in
        region = Region(size_of(shapes), self._device)
        for parameter, place in zip(parameters, tensors_in(region, shapes), strict=True):
            parameter.data = place.copy_(parameter.detach())
        torch.cuda.synchronize(self._device)
        self._weights.append(region)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        from nanovllm.runner.virtual_memory import Region, tensors_in

        region = Region(prod(shape) * dtype.itemsize, self._device)
        self._caches.append(region)
        (cache,) = tensors_in(region, [(shape, dtype)])
        return cache.zero_()

    def sleep(self, keeps_weights: bool) -> None:
        mapped = [region for region in self._weights if region.is_mapped]
        if keeps_weights and mapped:
            self._saved = [_saved(region.tensor()) for region in self._weights]
        for region in (*self._weights, *self._caches):
            region.unmap()
        torch.cuda.empty_cache()

    def wake(self, tags: Collection[str]) -> None:
        torch.cuda.empty_cache()
        if "weights" in tags:
            for region in self._weights:
                region.map()
            for region, saved in zip(self._weights, self._saved, strict=False):
                region.tensor().copy_(saved)
            self._saved = []
        if "kv_cache" in tags:
            for region in self._caches:
                if not region.is_mapped:
                    region.map()
                    region.tensor().zero_()
        torch.cuda.synchronize(self._device)


def _saved(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def choose_sleeper(device: torch.device, enable_sleep_mode: bool) -> Sleeper | None:
    """None where memory cannot be given back: on a GPU, unless it was asked for."""
    if device.type == "cpu":
        return HostSleeper()
    return GpuSleeper(device) if enable_sleep_mode else None
