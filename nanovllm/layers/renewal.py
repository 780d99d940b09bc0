"""Renewal: what a layer does so that its weights can be filled a second time, under an engine that runs.

Owns the way back from the form that a method multiplies by to the tensors that a checkpoint fills: `reopen`, then
`weights` as when the model was loaded, then `finish`. Invariant: where `moves` is False the tensors stay where they
are, and with them whatever remembers their addresses, such as a captured graph.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from nanovllm.layers.linear import LinearBase
    from nanovllm.layers.linear_method import LinearMethod


class Renewal:
    """A part of `LinearMethod`. frozen: why its weights cannot be filled again, if so.

    is_shared: somebody else writes to the tensors that `weights` fills, and a product reads them as they are then.
    """

    moves = False
    is_shared = False
    frozen: str | None = None

    def reopen(self) -> None:
        """Make the tensors that `weights` fills, with what they held; `finish` follows."""

    def tied_to(self, table: "LinearMethod") -> "LinearMethod":
        """For a head: what takes this method's place, so that it has the table's tensors again."""
        return table.tied()

    def discard(self) -> None:
        """Let go of what is held beside parameters; all of the weights are filled again before the next product."""


class PackedRenewal(Renewal):
    """A part of `PackedLinear`."""

    weight: nn.Parameter
    _packed: Tensor | None

    @property
    def moves(self) -> bool:  # type: ignore[override]
        return not self.is_shared

    def reopen(self) -> None:
        if self._packed is not None:
            self.weight = nn.Parameter(self._packed.to_dense(), requires_grad=False)
            self._packed = None

    def discard(self) -> None:
        if self._packed is not None:
            plain = torch.empty(self._packed.shape, dtype=self._packed.dtype)  # takes no memory before it is filled
            self.weight, self._packed = nn.Parameter(plain, requires_grad=False), None


def reopen(layer: "LinearBase", tied_to: "LinearBase | None") -> None:
    """tied_to: the table whose matrix the layer, a head, multiplies by."""
    if tied_to is not None and layer.method.moves:
        layer.method = layer.method.tied_to(tied_to.method)  # it has packed a copy of its own
    layer.method.reopen()
