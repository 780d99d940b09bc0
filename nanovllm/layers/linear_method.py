"""LinearMethod: how a linear layer holds its weights and multiplies by them; DenseLinear, the plain one.

Owns the interface between layers, which know shapes and ranks, and methods, which know tensors: nobody but a method
reads a weight. Invariant: a method computes x W^T + b for the matrix W that the checkpoint's tensors mean, whatever
form it keeps them in.
"""

from collections.abc import Callable, Iterator
from copy import copy
from typing import NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.kernels.gather_rows import gather_rows
from nanovllm.layers.renewal import Renewal
from nanovllm.layers.weight_specs import WeightSpec


class LinearSpec(NamedTuple):
    """The part of a checkpoint's matrices that a layer multiplies by, on this rank.

    sizes: the outputs of each matrix, which stand one below the other in the layer (query, key, value). parts: those of
    them that this rank holds; they may reach beyond the last one, and such rows are zeros. inputs: which of in_features
    this rank holds. dtype: of the layer's inputs and outputs. names: the matrices' names in the checkpoint, without
    ".weight"; empty until the layer is told (`Linear.weights`).
    """

    sizes: tuple[int, ...]
    parts: tuple[range, ...]
    in_features: int
    inputs: range
    dtype: torch.dtype
    names: tuple[str, ...] = ()

    @property
    def num_outputs(self) -> int:
        return sum(map(len, self.parts))

    def rows(self, part: int) -> slice:
        """Where the outputs of matrix `part` are among the layer's."""
        start = sum(map(len, self.parts[:part]))
        return slice(start, start + len(self.parts[part]))


class Gate(NamedTuple):
    """What a gated layer does with its product: [num_rows, 2 * size] -> [num_rows, size]. activation: its name."""

    activation: str
    apply: Callable[[Tensor], Tensor]


class Norm(Protocol):
    """What a method reads of the norm before it: see `layers/norm.py`."""

    @property
    def weight(self) -> Tensor | None: ...
    @property
    def eps(self) -> float: ...
    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]: ...


class LinearMethod(Renewal, nn.Module):
    """Made for one layer; its parameters are that layer's weights, on the device that is current when it is made."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        self.spec = spec

    def weights(self, part: int) -> Iterator[tuple[str, WeightSpec]]:
        """The tensors of matrix `part` in the checkpoint: what follows its name and a dot, and where it goes."""
        raise NotImplementedError

    def finish(self) -> None:
        """Called when the weights are in place, and before the first product; again after each `reopen`."""

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [num_rows, inputs] -> [num_rows, outputs]."""
        raise NotImplementedError

    def multiply_after_norm(
        self, norm: Norm, x: Tensor, residual: Tensor | None, bias: Tensor | None, gate: Gate | None = None
    ) -> tuple[Tensor, Tensor]:
        """(gate(multiply(norm of x + residual)), x + residual): for methods that have one kernel for it."""
        x, total = norm(x, residual)
        product = self.multiply(x, bias)
        return product if gate is None else gate.apply(product), total

    def gather_rows(self, ids: Tensor) -> Tensor:
        """Rows of W, for a table: ids [num_tokens] -> [num_tokens, inputs]."""
        raise NotImplementedError

    def tied(self) -> Self:
        """A second method over the same tensors, for a head that is tied to this table: it may `finish` them alone."""
        twin = copy(self)
        twin._parameters = self._parameters.copy()
        return twin


class DenseLinear(LinearMethod):
    """One matrix [outputs, inputs] in the layer's dtype, multiplied by PyTorch."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        shape = (spec.num_outputs, len(spec.inputs))
        self.weight = nn.Parameter(torch.empty(shape, dtype=spec.dtype), requires_grad=False)

    def weights(self, part: int) -> Iterator[tuple[str, WeightSpec]]:
        spec, target = self.spec, self.weight.data[self.spec.rows(part)]
        shape, fill = (spec.sizes[part], spec.in_features), filler(target, spec.parts[part], spec.inputs)
        yield "weight", WeightSpec(shape, fill, place=target if tuple(target.shape) == shape else None)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight, bias)

    def gather_rows(self, ids: Tensor) -> Tensor:
        return gather_rows(self.weight, ids)


def filler(target: Tensor, rows: range, columns: range) -> Callable[[Tensor], object]:
    def fill(tensor: Tensor) -> None:
        held = tensor[rows.start : rows.stop, columns.start : columns.stop]
        target[: len(held)].copy_(held)
        target[len(held) :].zero_()

    return fill
