"""WeightSpec: the place in a model that one tensor of a checkpoint fills.

Owns the description; each layer lists its own specs and `weights/loader.py` fills them. Invariant: the specs of a model
name every tensor of its checkpoint, and together write every parameter exactly once.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class WeightSpec(NamedTuple):
    """shape: of the whole tensor in the checkpoint. fill: copies this rank's part, converting dtype and device.

    instead_of: names of specs that this one fills together, for checkpoints that hold one tensor in their place.
    dtypes: that the tensor may have. has_rows: its first dimension is the layer's outputs, as that of a dense matrix.
    place: the parameter itself where it is the tensor, number by number: they may be written there instead of `fill`.
    """

    shape: tuple[int, ...]
    fill: Callable[[Tensor], object]
    instead_of: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS
    has_rows: bool = True
    place: Tensor | None = None


WeightSpecs = Iterator[tuple[str, WeightSpec]]  # (name in the checkpoint, spec)


def parameter_spec(name: str, parameter: Tensor) -> tuple[str, WeightSpec]:
    """The spec of a parameter that every rank holds whole."""
    return name, WeightSpec(tuple(parameter.shape), parameter.copy_)


def with_joined(name: str, parts: Sequence[tuple[str, WeightSpec]]) -> WeightSpecs:
    """`parts`, and the specs of checkpoints that hold them one below the other in `name`.weight and `name`.bias."""
    yield from parts
    for suffix in dict.fromkeys(part_name.rpartition(".")[2] for part_name, spec in parts if spec.has_rows):
        names, specs = zip(*((n, spec) for n, spec in parts if n.endswith(suffix)), strict=True)

        def fill(tensor: Tensor, specs: Sequence[WeightSpec] = specs) -> None:
            first = 0
            for spec in specs:
                spec.fill(tensor[first : first + spec.shape[0]])
                first += spec.shape[0]

        shape = (sum(spec.shape[0] for spec in specs), *specs[0].shape[1:])
        yield f"{name}.{suffix}", WeightSpec(shape, fill, instead_of=names, dtypes=specs[0].dtypes)
