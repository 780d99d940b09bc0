"""WeightSpec: the place in a model that one tensor of a checkpoint fills.

Owns the description; each layer lists its own specs and `weights/loader.py` fills them. Invariant: the specs of a model
name every tensor of its checkpoint, and together write every parameter exactly once.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class WeightSpec(NamedTuple):
    """shape: of the whole tensor in the checkpoint. fill: copies this rank's part, converting dtype and device.

    instead_of: names of specs that this one fills together, for checkpoints that hold one tensor in their place.
    dtypes: that the tensor may have. outputs: which of its dimensions is the layer's outputs, as the first one of a
    dense matrix; None where they share it.
    place: the parameter itself where it is the tensor, number by number: they may be written there instead of `fill`.
    layer: the `LinearBase`, or the `LinearMethod` beside one, that may hold it in a form of its own.
    stand_in: makes what load_format="dummy" puts there, where that is no vector and no matrix of numbers.
    """

    shape: tuple[int, ...]
    fill: Callable[[Tensor], object]
    instead_of: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS
    outputs: int | None = 0
    place: Tensor | None = None
    layer: nn.Module | None = None
    stand_in: "Callable[[torch.Generator], Tensor] | None" = None


WeightSpecs = Iterator[tuple[str, WeightSpec]]  # (name in the checkpoint, spec)


def unfilled(*size: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter that specs fill."""
    return nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)


def parameter_spec(name: str, parameter: Tensor) -> tuple[str, WeightSpec]:
    """The spec of a parameter that every rank holds whole."""
    return name, WeightSpec(tuple(parameter.shape), parameter.copy_, place=parameter.detach())


def part_spec(name: str, parameter: Tensor, size: int, held: range) -> tuple[str, WeightSpec]:
    """The spec of a vector of `size` numbers, of which this rank holds those."""
    return name, WeightSpec((size,), lambda tensor: parameter.copy_(tensor[held.start : held.stop]))


def with_joined(name: str, parts: Sequence[tuple[str, WeightSpec]]) -> WeightSpecs:
    """`parts`, and the specs of checkpoints that hold them as one layer `name`, with their outputs side by side."""
    yield from parts
    layers, suffixes = zip(*(part_name.rpartition(".")[::2] for part_name, _ in parts), strict=True)
    for suffix in dict.fromkeys(suffixes):
        names, specs = zip(*(part for part, of in zip(parts, suffixes, strict=True) if of == suffix), strict=True)
        if len(names) < len(set(layers)):
            continue  # some of them are kept in another form
        outputs, shape = specs[0].outputs, list(specs[0].shape)
        if outputs is not None:
            shape[outputs] = sum(spec.shape[outputs] for spec in specs)

        def fill(tensor: Tensor, specs: Sequence[WeightSpec] = specs, outputs: int | None = outputs) -> None:
            first = 0
            for spec in specs:
                if outputs is None:
                    spec.fill(tensor)
                else:
                    last = first + spec.shape[outputs]
                    spec.fill(tensor[(slice(None),) * outputs + (slice(first, last),)])
                    first = last

        replaced = tuple(other for n, spec in zip(names, specs, strict=True) for other in spec.instead_of or (n,))
        yield f"{name}.{suffix}", WeightSpec(tuple(shape), fill, replaced, specs[0].dtypes, outputs)
