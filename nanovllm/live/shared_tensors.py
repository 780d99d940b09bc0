"""Tensors for another process of this host: on a GPU a handle to where they lie, on a CPU a copy of their numbers.

Owns the form in which they travel: `portable` for Python's pickle, `handle_of` and `open_handle` for JSON. Invariant: a
handle holds numbers and bytes only, so that to read one runs no code of the sender's; the sender keeps the tensor as it
is until the receiver says that it has read it.
"""

import base64
from math import prod
from typing import Any

import torch
from torch import Tensor


class SharedTensor:
    """A tensor on a GPU that becomes a tensor where it is unpickled, over the same memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        return open_handle, (handle_of(self._tensor),)


def portable(tensor: Tensor) -> Any:
    """What becomes this tensor's equal where it is unpickled."""
    tensor = tensor.detach()
    if tensor.is_cuda:
        return SharedTensor(tensor)
    tensor = tensor.cpu().contiguous()
    is_part = tensor.untyped_storage().nbytes() != tensor.nbytes  # pickle takes the whole storage along
    return tensor.clone() if is_part else tensor


def handle_of(tensor: Tensor) -> dict[str, Any]:
    """A CUDA tensor by CUDA IPC, as values of JSON. Raises ValueError for a tensor that lies on no GPU."""
    if not tensor.is_cuda:
        raise ValueError(f"only tensors on a GPU can be shared by a handle, and this one is on {tensor.device}")
    tensor = tensor.detach().contiguous()
    torch.cuda.current_stream(tensor.device).synchronize()  # the other process knows nothing of this one's streams
    device, *parts = tensor.untyped_storage()._share_cuda_()
    return {
        "device_uuid": str(torch.cuda.get_device_properties(device).uuid),
        "parts": [_encode(part) for part in parts],
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "offset": tensor.storage_offset(),
    }


def open_handle(handle: dict[str, Any]) -> Tensor:
    """The tensor, on the same device. Raises ValueError for a handle that is not of this host's GPUs."""
    device = _device_of(handle["device_uuid"])
    with torch.cuda.device(device):
        storage = torch.UntypedStorage._new_shared_cuda(device, *map(_decode, handle["parts"]))
    dtype = getattr(torch, handle["dtype"])
    whole = torch.empty(0, dtype=dtype, device=storage.device).set_(storage)
    return whole[handle["offset"] :][: prod(handle["shape"])].view(handle["shape"])


def _device_of(uuid: str) -> int:
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == uuid:
            return index
    raise ValueError(f"a handle is of the GPU {uuid}, which this process does not see")


def _encode(part: Any) -> Any:
    return {"bytes": base64.b64encode(part).decode()} if isinstance(part, bytes) else part


def _decode(part: Any) -> Any:
    return base64.b64decode(part["bytes"]) if isinstance(part, dict) else part
