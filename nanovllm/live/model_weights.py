"""ModelWeights: the tensors of a model that runs, by the names that a checkpoint gives them, to be filled again.

Owns what a worker does for an update: it says which tensors the model has (`table`), keeps what is sent to it (`held`)
and writes it (`write`). Invariant: parameters are written where they are, unless a layer says that its tensors move;
so whatever remembers addresses, as captured graphs do, goes on.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nanovllm.layers.embedding import LMHead
from nanovllm.layers.linear import LinearBase
from nanovllm.layers.linear_method import LinearMethod
from nanovllm.layers.renewal import reopen
from nanovllm.layers.weight_specs import WeightSpec

Named = tuple[str, Tensor]


class Slot(NamedTuple):
    """What a tensor must be. instead_of, dtypes: as in WeightSpec. frozen: why it cannot be written again, if so."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    instead_of: tuple[str, ...] = ()
    frozen: str | None = None


class Table(NamedTuple):
    """slots: by name. is_tied: the head is the embedding, under another name. process: that the model is in."""

    slots: dict[str, Slot]
    is_tied: bool
    process: int


class ModelWeights:
    def __init__(self, model: Any) -> None:
        self._model = model
        self.held: list[Named] = []
        self._head = model.lm_head
        self._moves = any(module.method.moves for module in model.modules() if isinstance(module, LinearBase))
        self._specs: dict[str, WeightSpec] | None = None  # kept where nothing moves: to list them takes milliseconds

    @property
    def is_tied(self) -> bool:
        return isinstance(self._head, LMHead) and self._head.is_tied

    def specs(self) -> dict[str, WeightSpec]:
        if self._specs is not None:
            return self._specs
        specs = dict(self._model.weights())
        if not self._moves:
            self._specs = specs
        return specs

    def table(self) -> Table:
        specs = self.specs()
        slots = {
            name: Slot(spec.shape, spec.dtypes, spec.instead_of, _frozen(layers_of(name, specs)))
            for name, spec in specs.items()
        }
        return Table(slots, self.is_tied, os.getpid())

    @torch.no_grad()
    def write(self, tensors: Sequence[Named]) -> None:
        """Fill the model with these, which have been checked. Returns when the device has done it."""
        opened = self._open(tensors) if self._moves else []
        specs = self.specs()
        sources: list[Tensor] = []
        places: list[Tensor] = []
        for name, tensor in tensors:
            spec, tensor = specs[name], tensor.detach()
            if spec.place is not None and tensor.device == spec.place.device and tensor.dtype == spec.place.dtype:
                sources.append(tensor)
                places.append(spec.place)
            else:
                spec.fill(tensor)
        if places:
            torch._foreach_copy_(places, sources)  # in few launches
        for linear in opened:
            linear.finish()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # whoever lent the tensors may write to them again

    def _open(self, tensors: Sequence[Named]) -> list[LinearBase]:
        """Make the layers that these are for ready to be filled."""
        specs = dict(self._model.weights())
        layers = dict.fromkeys(layer for name, _ in tensors for layer in layers_of(name, specs))
        opened = {layer: None for layer in layers if isinstance(layer, LinearBase)}
        if self.is_tied and self._model.embed_tokens in opened:
            opened[self._head] = None
        for linear in opened:
            reopen(linear, self._model.embed_tokens if self.is_tied and linear is self._head else None)
        return list(opened)


def layers_of(name: str, specs: Mapping[str, WeightSpec]) -> list[nn.Module]:
    """Those that the tensor fills, with others or alone, and that may hold it in a form of their own."""
    layers = (specs[part].layer for part in specs[name].instead_of or (name,))
    return [layer for layer in layers if layer is not None]


def _frozen(layers: Iterable[nn.Module]) -> str | None:
    methods = (layer.method if isinstance(layer, LinearBase) else layer for layer in layers)
    return next((method.frozen for method in methods if isinstance(method, LinearMethod) and method.frozen), None)


def weights_of(runner: Any) -> ModelWeights:
    """Those of a worker's model; the same object for as long as the model lives."""
    kept = vars(runner.model)
    if "live_weights" not in kept:
        kept["live_weights"] = ModelWeights(runner.model)
    weights: ModelWeights = kept["live_weights"]
    return weights


# -- what is sent to a worker, to be called with its runner --


def describe(runner: Any) -> Table:
    return weights_of(runner).table()


@dataclass(frozen=True)
class Hold:
    """Keep these until they are written or dropped."""

    tensors: Sequence[Named]

    def __call__(self, runner: Any) -> None:
        weights_of(runner).held.extend(self.tensors)


@dataclass(frozen=True)
class Write:
    """Fill the model with these, or with what it was sent before."""

    tensors: Sequence[Named] | None = None

    def __call__(self, runner: Any) -> None:
        weights = weights_of(runner)
        try:
            weights.write(weights.held if self.tensors is None else self.tensors)
        finally:
            weights.held = []


def drop(runner: Any) -> None:
    weights_of(runner).held = []
