"""WeightSlot: the place in a model that one tensor of a checkpoint fills.

Owns the description; each layer lists its own slots and `weights/loader.py` fills them. Invariant: the slots of a model
name every tensor of its checkpoint, and together write every parameter exactly once.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor


class WeightSlot(NamedTuple):
    """shape: of the whole tensor in the checkpoint. fill: copies this rank's part, converting dtype and device.

    instead_of: names of slots that this one fills together, for checkpoints that hold one tensor in their place.
    """

    shape: tuple[int, ...]
    fill: Callable[[Tensor], object]
    instead_of: tuple[str, ...] = ()


Slots = Iterator[tuple[str, WeightSlot]]  # (name in the checkpoint, slot)


def parameter_slot(name: str, parameter: Tensor) -> tuple[str, WeightSlot]:
    """The slot of a parameter that every rank holds whole."""
    return name, WeightSlot(tuple(parameter.shape), parameter.copy_)
