"""AdapterLinear: another method's product, and what each row's adapter adds to it.

Owns the slots of one layer: stacks of A, B and biases on the device, and how they are filled. What a step's rows take
stands in a `StepAdapters` that all layers of a model share, as they run one after the other. Invariant: where a step
has no adapter, or none that has this layer, it is the other method and nothing else.

Under tensor parallelism A is split as the layer's inputs are and B as its outputs, so that what ranks add up or put
side by side anyway is all that they exchange.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.dispatch import use_triton
from nanovllm.kernels.lora import AdapterRows, Linear, expand, linear_and_shrink, shrink
from nanovllm.layers.fused_linear import FusedLinear
from nanovllm.layers.linear_method import Gate, LinearMethod, LinearSpec, Norm, filler
from nanovllm.layers.weight_specs import WeightSpec

RANK_MULTIPLE = 16  # what matrix units take; ranks are padded with zeros


@dataclass
class StepAdapters:
    """tokens: of the rows that run now; None: no adapter, or nothing runs. slot: that is being filled, if one is, and
    filled: which matrices have been.

    linear: the product of few rows, where it is the same to the bit in any batch. semaphores: as in AdapterRows.
    """

    tokens: AdapterRows | None = None
    slot: int | None = None
    filled: "list[tuple[AdapterLinear, int]]" = field(default_factory=list)
    linear: Linear = F.linear
    semaphores: Tensor | None = None


class AdapterLinear(LinearMethod):
    """spec: the layer's own, with names. Its stacks are made at once, on the current device."""

    def __init__(self, base: LinearMethod, spec: LinearSpec, num_slots: int, max_rank: int, step: StepAdapters) -> None:
        super().__init__(spec)
        self.base, self.step = base, step
        self.rank = padded_rank(max_rank)
        self.is_used = False  # has any adapter had this layer?
        self._filled: set[int] = set()  # slots
        self._make_stacks(num_slots)

    def _make_stacks(self, num_slots: int) -> None:
        spec = self.spec
        self.sizes = [len(part) for part in spec.parts]
        self.a = torch.zeros(num_slots, len(spec.parts) * self.rank, len(spec.inputs), dtype=spec.dtype)
        self.b = torch.zeros(num_slots, spec.num_outputs, self.rank, dtype=spec.dtype)
        self.b_bias = torch.zeros(num_slots, spec.num_outputs, dtype=spec.dtype)

    # --- the other method's ------------------------------------------------------------------

    def weights(self, part: int) -> Iterator[tuple[str, WeightSpec]]:
        """While a slot is filled, the adapter's tensors that stand by the layer's outputs; else the layer's own."""
        if self.step.slot is None:
            yield from self.base.weights(part)
            return
        size, rows, held = self.spec.sizes[part], self.spec.rows(part), self.spec.parts[part]
        b, bias = self.b[self.step.slot, rows], self.b_bias[self.step.slot, rows, None]
        yield "lora_B", WeightSpec((size, self.rank), self._noting(part, filler(b, held, range(self.rank))))
        yield "lora_bias", WeightSpec((size, 1), filler(bias, held, range(1)))

    def _noting(self, part: int, fill: Callable[[Tensor], object]) -> Callable[[Tensor], None]:
        def fill_and_note(tensor: Tensor) -> None:
            fill(tensor)
            self.step.filled.append((self, part))

        return fill_and_note

    def finish(self) -> None:
        self.base.finish()

    @property
    def moves(self) -> bool:  # type: ignore[override]
        return self.base.moves

    @property
    def frozen(self) -> str | None:  # type: ignore[override]
        return self.base.frozen

    @property
    def is_shared(self) -> bool:  # type: ignore[override]
        return self.base.is_shared

    @is_shared.setter
    def is_shared(self, value: bool) -> None:
        self.base.is_shared = value

    def reopen(self) -> None:
        self.base.reopen()

    def discard(self) -> None:
        self.base.discard()

    def tied_to(self, table: LinearMethod) -> LinearMethod:
        self.base = self.base.tied_to(table.base if isinstance(table, AdapterLinear) else table)
        return self

    def gather_rows(self, ids: Tensor) -> Tensor:
        return self.base.gather_rows(ids)

    # --- slots ---------------------------------------------------------------------------------

    def clear(self, slot: int) -> None:
        if slot in self._filled:
            for stack in (self.a, self.b, self.b_bias):
                stack[slot].zero_()
            self._filled.remove(slot)

    def forget(self) -> None:
        """All slots are zero."""
        self._filled.clear()

    def begin(self, slot: int) -> bool:
        """The slot will be filled; whether that makes a difference to which layers steps have to ask."""
        self._filled.add(slot)
        was_used, self.is_used = self.is_used, True
        return not was_used

    def fill_a(self, slot: int, part: int, a: Tensor) -> None:
        """a [rank, inputs of the whole layer]"""
        first = part * self.rank
        self.a[slot, first : first + a.shape[0]].copy_(a[:, self.spec.inputs.start : self.spec.inputs.stop])

    # --- products ------------------------------------------------------------------------------

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if (rows := self._rows()) is None:
            return self.base.multiply(x, bias)
        return self._adapted(x, bias, rows)

    def multiply_after_norm(
        self, norm: Norm, x: Tensor, residual: Tensor | None, bias: Tensor | None, gate: Gate | None = None
    ) -> tuple[Tensor, Tensor]:
        if (rows := self._rows()) is None:
            return self.base.multiply_after_norm(norm, x, residual, bias, gate)
        x, total = norm(x, residual)
        return self._adapted(x, bias, rows, gate), total

    def _rows(self) -> AdapterRows | None:
        return self.step.tokens if self.is_used else None

    def _adapted(self, x: Tensor, bias: Tensor | None, rows: AdapterRows, gate: Gate | None = None) -> Tensor:
        if isinstance(self.base, FusedLinear):
            product, shrunk = linear_and_shrink(x, self.base.weight, bias, self.a, rows, self.base.semaphores)
        else:
            shrunk = shrink(x, self.a, rows, self.step.linear)
            product = self.base.multiply(x, bias)
        return self._expanded(product, shrunk, rows, gate)

    def _expanded(self, product: Tensor, shrunk: Tensor, rows: AdapterRows, gate: Gate | None = None) -> Tensor:
        to = self.b, self.b_bias, self.sizes, rows
        if gate is None:
            return expand(product, shrunk, *to, linear=self.step.linear)
        if use_triton(product):
            return expand(product, shrunk, *to, activation=gate.activation)
        return gate.apply(expand(product, shrunk, *to, linear=self.step.linear))


class AdapterTable(AdapterLinear):
    """For a table of vectors: a token gets B times its column of A as well. Columns are kept as rows."""

    def _make_stacks(self, num_slots: int) -> None:
        spec = self.spec
        self.sizes = [spec.in_features]
        self.a = torch.zeros(num_slots, spec.num_outputs, self.rank, dtype=spec.dtype)
        self.b = torch.zeros(num_slots, spec.in_features, self.rank, dtype=spec.dtype)
        self.b_bias = torch.zeros(num_slots, spec.in_features, dtype=spec.dtype)

    def weights(self, part: int) -> Iterator[tuple[str, WeightSpec]]:
        if self.step.slot is None:
            yield from self.base.weights(part)
            return
        yield "lora_B", WeightSpec((self.spec.in_features, self.rank), self._noting(0, self.b[self.step.slot].copy_))

    def fill_a(self, slot: int, part: int, a: Tensor) -> None:
        (held,) = self.spec.parts
        columns = a[:, held.start : held.stop]
        self.a[slot, : columns.shape[1], : columns.shape[0]].copy_(columns.T)

    def gather_rows(self, ids: Tensor) -> Tensor:
        found = self.base.gather_rows(ids)
        if (rows := self._rows()) is None:
            return found
        slots = rows.slots.clamp(max=rows.num_slots - 1)
        return self._expanded(found, self.a[slots, ids].float()[None], rows)


def padded_rank(max_rank: int) -> int:
    return -(-max_rank // RANK_MULTIPLE) * RANK_MULTIPLE
