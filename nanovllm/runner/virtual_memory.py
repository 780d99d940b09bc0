"""Regions of a GPU's memory that can be given back to the device and come again at the same addresses.

Owns the calls of the CUDA driver for it (virtual memory management: an address range is reserved once, and memory is
mapped into it as long as it is wanted). Invariant: a tensor over a region stays valid as an address for as long as the
region lives, and as values while it is mapped; whatever has remembered the address, as captured graphs do, goes on.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 512  # of tensors in a region, in bytes
_PINNED, _ON_DEVICE, _READ_WRITE, _RECOMMENDED = 1, 1, 3, 1  # as cuda.h numbers them
_OUT_OF_MEMORY = 2


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _AllocationFlags(ctypes.Structure):
    _fields_ = (
        ("compression_type", ctypes.c_ubyte),
        ("gpu_direct_rdma_capable", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class _AllocationProp(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("requested_handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32_handle_meta_data", ctypes.c_void_p),
        ("flags", _AllocationFlags),
    )


class _AccessDesc(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status == _OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(f"{name}: the device has too little free memory")
    if status != 0:
        raise RuntimeError(f"{name} failed with CUDA driver error {status}")


class Region:
    """num_bytes of memory of one device, mapped when it is made."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        torch.cuda.current_stream(device).synchronize()  # this also makes the device's context, which must exist
        self.device = device
        location = _Location(_ON_DEVICE, device.index or 0)
        self._prop = _AllocationProp(type=_PINNED, location=location)
        self._access = _AccessDesc(location, _READ_WRITE)
        granularity = ctypes.c_size_t()
        _call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(self._prop), _RECOMMENDED)
        self.num_bytes = -(-num_bytes // granularity.value) * granularity.value
        address = ctypes.c_uint64()
        size, no_hint = ctypes.c_size_t(self.num_bytes), ctypes.c_uint64(0)
        _call("cuMemAddressReserve", ctypes.byref(address), size, ctypes.c_size_t(0), no_hint, ctypes.c_uint64(0))
        self.address = address.value
        self._handle: ctypes.c_uint64 | None = None
        self.map()

    @property
    def is_mapped(self) -> bool:
        return self._handle is not None

    def map(self) -> None:
        """Take memory again; what it holds is undefined. Raises torch.OutOfMemoryError, and nothing is taken then."""
        if self._handle is not None:
            return
        handle, address, size = ctypes.c_uint64(), ctypes.c_uint64(self.address), ctypes.c_size_t(self.num_bytes)
        _call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(self._prop), ctypes.c_uint64(0))
        _call("cuMemMap", address, size, ctypes.c_size_t(0), handle, ctypes.c_uint64(0))
        _call("cuMemSetAccess", address, size, ctypes.byref(self._access), ctypes.c_size_t(1))
        self._handle = handle

    def unmap(self) -> None:
        """Give the memory back to the device, once all that is queued has read it."""
        if self._handle is None:
            return
        torch.cuda.synchronize(self.device)
        _call("cuMemUnmap", ctypes.c_uint64(self.address), ctypes.c_size_t(self.num_bytes))
        _call("cuMemRelease", self._handle)
        self._handle = None

    def tensor(self) -> Tensor:
        """All of it as bytes. It does not keep the region alive."""
        return torch.as_tensor(_Bytes(self.address, self.num_bytes), device=self.device)

    def __del__(self) -> None:
        if getattr(self, "address", 0) and torch.cuda.is_initialized():
            self.unmap()
            _call("cuMemAddressFree", ctypes.c_uint64(self.address), ctypes.c_size_t(self.num_bytes))


class _Bytes:
    """The CUDA array interface, version 3, which `torch.as_tensor` reads."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": (num_bytes,),
            "strides": None,
            "typestr": "|u1",
        }


def tensors_in(region: Region, shapes: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
    """Tensors of these shapes and dtypes, one behind the other; `size_of` says how much they take."""
    whole, start, tensors = region.tensor(), 0, []
    for shape, dtype in shapes:
        size = prod(shape) * dtype.itemsize
        tensors.append(whole[start : start + size].view(dtype).view(shape))
        start += _aligned(size)
    return tensors


def size_of(shapes: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> int:
    return sum(_aligned(prod(shape) * dtype.itemsize) for shape, dtype in shapes)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
