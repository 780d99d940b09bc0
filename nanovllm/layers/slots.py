"""WeightSlot: the place in a model that one tensor of a checkpoint fills.

Owns the description; each layer lists its own slots and `weights/loader.py` fills them. Invariant: the slots of a model
name every tensor of its checkpoint, and together write every parameter exactly once.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class WeightSlot(NamedTuple):
    """shape: of the whole tensor in the checkpoint. fill: copies this rank's part, converting dtype and device.

    instead_of: names of slots that this one fills together, for checkpoints that hold one tensor in their place.
    dtypes: that the tensor may have. has_rows: its first dimension is the layer's outputs, as that of a dense matrix.
    """

    shape: tuple[int, ...]
    fill: Callable[[Tensor], object]
    instead_of: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS
    has_rows: bool = True


Slots = Iterator[tuple[str, WeightSlot]]  # (name in the checkpoint, slot)


def parameter_slot(name: str, parameter: Tensor) -> tuple[str, WeightSlot]:
    """The slot of a parameter that every rank holds whole."""
    return name, WeightSlot(tuple(parameter.shape), parameter.copy_)


def with_joined(name: str, parts: Sequence[tuple[str, WeightSlot]]) -> Slots:
    """`parts`, and the slots of checkpoints that hold them one below the other in `name`.weight and `name`.bias."""
    yield from parts
    for suffix in dict.fromkeys(part_name.rpartition(".")[2] for part_name, slot in parts if slot.has_rows):
        names, slots = zip(*((n, slot) for n, slot in parts if n.endswith(suffix)), strict=True)

        def fill(tensor: Tensor, slots: Sequence[WeightSlot] = slots) -> None:
            first = 0
            for slot in slots:
                slot.fill(tensor[first : first + slot.shape[0]])
                first += slot.shape[0]

        shape = (sum(slot.shape[0] for slot in slots), *slots[0].shape[1:])
        yield f"{name}.{suffix}", WeightSlot(shape, fill, instead_of=names, dtypes=slots[0].dtypes)
