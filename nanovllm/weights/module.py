"""ModuleCheckpoint: a transformers model in this process, in the place of a folder.

Owns the way from a module to what a checkpoint has, and back: its parameters become views of the engine's, which hold
query, key and value, or gate and up projection, in one matrix. Invariant: a parameter is shared only where its numbers
are the engine's, one by one, in one memory; all others are copies, and stay with whoever has them.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovllm.config import NamedModule
from nanovllm.layers.weight_specs import WeightSpec
from nanovllm.weights.checkpoint import NOWHERE, Places


class ModuleCheckpoint:
    def __init__(self, name: NamedModule) -> None:
        """Raises ValueError for a module without parameters, or spread over devices."""
        self.module: Any = name.module
        self.path = Path(name)
        parameters = dict(self.module.named_parameters())
        if not parameters or any(parameter.is_meta for parameter in parameters.values()):
            raise ValueError(f"the model {name} has no parameters with values in this process")
        devices, dtypes = ({getattr(one, what) for one in parameters.values()} for what in ("device", "dtype"))
        if len(devices) > 1 or any(hasattr(one, "full_tensor") for one in parameters.values()):
            raise ValueError(f"the parameters of the model {name} are spread over devices; gather them on one")
        self.device: torch.device = devices.pop()
        stated = json.loads(self.module.config.to_json_string(use_diff=True))
        self.config = {**stated, "architectures": [type(self.module).__name__]}
        if len(dtypes) == 1:
            self.config["dtype"] = str(dtypes.pop()).removeprefix("torch.")
        generation = getattr(self.module, "generation_config", None)
        self.generation_config = {} if generation is None else json.loads(generation.to_json_string(use_diff=True))

    def tensors(self, dtype: torch.dtype, places: Places = NOWHERE) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._named():
            yield name, tensor.detach()

    def headers(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor.detach().to("meta")) for name, tensor in self._named())

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters, and buffers that a checkpoint holds too."""
        saved = self.module.state_dict(keep_vars=True)
        yield from self.module.named_parameters()
        yield from ((name, buffer) for name, buffer in self.module.named_buffers() if name in saved)


def share(module: Any, specs: Mapping[str, WeightSpec]) -> None:
    """Make the module's parameters views of the engine's, where those hold the same numbers. specs: of the engine's."""
    for name, parameter in module.named_parameters():
        place = _place_of(name, specs)
        if place is not None and _kind(place) == _kind(parameter):
            parameter.data = place


def copies(module: Any, specs: Mapping[str, WeightSpec]) -> list[tuple[str, Tensor]]:
    """The parameters whose memory is not the engine's, by name."""
    return [
        (name, parameter)
        for name, parameter in module.named_parameters()
        if (place := _place_of(name, specs)) is None or place.data_ptr() != parameter.data_ptr()
    ]


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _place_of(name: str, specs: Mapping[str, WeightSpec]) -> Tensor | None:
    return specs[name].place if name in specs else None
