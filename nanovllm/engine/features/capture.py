"""Hidden states that a request captures, as steps bring them.

Owns their order in the request; `runner/hidden_states.py` takes them out of the layers. Invariant: a token's states are
kept once, though a preempted request computes the token again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Capture:
    """layers: behind which layers. states: of the tokens in order, by steps."""

    layers: tuple[int | str, ...]
    states: list[dict[int | str, Any]] = field(default_factory=list)
    num_tokens: int = 0

    def take(self, start: int, states: dict[int | str, Any]) -> None:
        """Those that a step brings, of the tokens from `start` on."""
        new = {layer: tokens[self.num_tokens - start :] for layer, tokens in states.items()}
        num_new = len(next(iter(new.values())))
        if num_new:
            self.states.append(new)
            self.num_tokens += num_new

    def begin_anew(self) -> None:
        self.num_tokens = sum(len(next(iter(part.values()))) for part in self.states)

    def by_layer(self) -> dict[int | str, list[Any]]:
        """Layer -> parts in order, to be joined by whoever may know of tensors."""
        return {layer: [part[layer] for part in self.states] for layer in self.layers}


def check_layers(layers: Sequence[int | str], num_layers: int, name: str) -> None:
    """Raise ValueError for `name` if the model does not have one of these."""
    for layer in layers:
        if layer != "norm" and not -num_layers <= layer < num_layers:  # type: ignore[operator]
            raise ValueError(f"{name}: capture names layer {layer}; the model's are in [-{num_layers}, {num_layers})")
