"""The option `quantization`: a dense checkpoint whose linear layers are quantized while they are loaded.

Owns which layers, and how their numbers are rounded: each output (or group of inputs) by itself, to the nearest, with
no look at any data. The embedding, the head and what chooses among experts
stay dense.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.kernels.quantized_linear import pack_int4, quantize_rows
from nanovllm.layers.linear_method import LinearSpec
from nanovllm.layers.weight_specs import WeightSpec
from nanovllm.quantization.quantized_linear import QuantizedLinear, Rounding
from nanovllm.quantization.scheme import is_named

_GROUP_SIZES = (128, 64, 32)  # of "int4": the first that the inputs are whole groups of
_ROUTERS = ("gate", "router")  # of mixtures: small, and each number of theirs decides
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class OnlineScheme:
    """name: "fp8" or "int8_dynamic" (weights and inputs), "int8" or "int4" (weights alone)."""

    name: str

    def method_of(self, name: str) -> "Online | None":
        return None if is_named(name, ("embed_tokens", "lm_head", *_ROUTERS)) else Online(self.name)


@dataclass(frozen=True)
class Online:
    name: str

    def __call__(self, spec: LinearSpec) -> QuantizedLinear:
        group_size, kind = None, self.name.removesuffix("_dynamic")
        if kind == "int4":
            group_size = next((n for n in _GROUP_SIZES if len(spec.inputs) % n == 0), None)
            if group_size is None:
                names = ", ".join(spec.names)
                raise ValueError(f"{names}: {len(spec.inputs)} inputs are no multiple of 32, which 'int4' needs")
        rounding = Rounding(kind) if self.name in ("fp8", "int8_dynamic") else None
        return OnlineLinear(spec, kind, group_size, has_zeros=kind == "int4", rounding=rounding)


class OnlineLinear(QuantizedLinear):
    """New weights are rounded as the first ones were, into the same tensors."""

    frozen = None

    def finish(self) -> None:
        zero, semaphores = self.zero, self.semaphores
        super().finish()
        self.zero, self.semaphores = zero, semaphores if semaphores is not None else self.semaphores

    def weights(self, part: int) -> Iterator[tuple[str, WeightSpec]]:
        shape = (self.spec.sizes[part], self.spec.in_features)
        name, weight_spec = self.weight_spec("weight", part, shape, _FLOATS, self._quantize, outputs=0)
        yield name, weight_spec._replace(stand_in=None)  # a dense matrix

    def _quantize(self, part: int, dense: Tensor) -> None:
        rows, columns = self.spec.parts[part], self.spec.inputs
        own = self.spec.rows(part)
        held = dense[rows.start : rows.stop].float()
        if self.kind == "int4":
            assert self.zero is not None
            values, scale, zero = _round_to_int4(held[:, columns.start : columns.stop], self.group_size)
            self.codes.data[own], self.scale.data[own], self.zero.data[own] = pack_int4(values), scale, zero
        else:  # a scale is for all inputs, whoever holds them
            codes, self.scale.data[own] = quantize_rows(held, self.kind)
            self.codes.data[own] = codes[:, columns.start : columns.stop]


def _round_to_int4(x: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values -8 .. 7, scale, zero): the lowest number of a group, or 0, is -8, and the highest, or 0, is 7."""
    groups = x.unflatten(1, (-1, group_size))
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    scale = (high - low).clamp(min=1e-12) / 15
    zero = (-8 - low / scale).round().clamp(-8, 7)
    values = (groups / scale[..., None] + zero[..., None]).round().clamp(-8, 7)
    return values.flatten(1).to(torch.int8), scale, zero.to(torch.int8)
