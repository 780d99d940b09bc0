"""quantization="gguf": the matrices of a GGUF file kept in the bits that they have there.

Owns which layers these are and where their tensors go; what the blocks of a file mean is `weights/gguf_packed.py`'s.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels.cpu.rounded_product import RoundedProduct
from nanovllm.kernels.quantized_linear import CPU_GROUP_SIZE, rounded_product
from nanovllm.layers.linear_method import Gate, LinearSpec, Norm
from nanovllm.layers.weight_specs import WeightSpec
from nanovllm.quantization.mxfp4 import Mxfp4Linear, Mxfp4Scheme
from nanovllm.quantization.quantized_linear import QuantizedLinear, Rounding, usual_scale

# Matrices that some files hold in one, by the name that each has here.
_JOINED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("qkv_proj",)),
    **{"gate_proj": ("gate_up_proj", "q_proj"), "up_proj": ("gate_up_proj",), "query_proj": ("q_proj",)},
    **dict.fromkeys(("in_proj_q", "in_proj_k", "in_proj_v"), ("in_proj_qkv", "in_proj_qkvz")),
    **{"in_proj_z": ("in_proj_qkvz", "in_proj"), "in_proj_a": ("in_proj_ba",), "in_proj_b": ("in_proj_ba", "in_proj")},
    **dict.fromkeys(("in_proj_x", "in_proj_c", "in_proj_dt", "b_proj", "c_proj", "x_proj"), ("in_proj",)),
}


@dataclass(frozen=True)
class Gguf:
    """bits: of a code, 4 or 8. group_size: inputs that share a scale. has_low: what code 0 stands for is no scale."""

    bits: int
    group_size: int
    has_low: bool

    def __call__(self, spec: LinearSpec) -> QuantizedLinear:
        return GgufLinear(spec, self)


class GgufScheme:
    """fields["matrices"]: by the layer's name, the fields of `Gguf`; those that are not named are dense.

    fields["experts"]: as in a config.json, of experts in MXFP4, or None.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._methods = {name: Gguf(*packed) for name, packed in fields["matrices"].items()}
        self._experts = Mxfp4Scheme(fields["experts"]) if fields["experts"] else None

    def method_of(self, name: str) -> "Gguf | type[Mxfp4Linear] | None":
        module, _, last = name.rpartition(".")
        for held_in in (last, *_JOINED.get(last, ())):
            if (method := self._methods.get(f"{module}.{held_in}" if module else held_in)) is not None:
                return method
        return None if self._experts is None else self._experts.method_of(name)


class GgufLinear(QuantizedLinear):
    """On a CPU, inputs are rounded to 8 bits, with a scale for each 32 of them, as llama.cpp does."""

    def __init__(self, spec: LinearSpec, form: Gguf) -> None:
        super().__init__(spec, f"int{form.bits}", form.group_size, has_low=form.has_low, scale_dtype=torch.float16)
        self.form = form
        if self.codes.is_cpu:
            self.rounding = Rounding("int8", CPU_GROUP_SIZE)
        self._product: RoundedProduct | None = None

    def weights(self, part: int) -> Iterator[tuple[str, WeightSpec]]:
        size, inputs, groups, halves = self.spec.sizes[part], self.spec.in_features, self.num_groups, (torch.float16,)
        codes = (size, inputs * self.form.bits // 8)
        yield self.weight_spec("weight_codes", part, codes, (self.codes.dtype,), self.fill_codes, outputs=0)
        yield self.weight_spec("weight_scale", part, (size, groups), halves, self.fill_scale, outputs=0)
        if self.form.has_low:
            low = -7.5 * usual_scale(self.kind, inputs) if self.form.bits == 4 else 0.0
            yield self.weight_spec("weight_low", part, (size, groups), halves, self.fill_low, outputs=0, stand_in=low)

    def finish(self) -> None:
        super().finish()
        self._product = rounded_product(self.weight)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self._product is not None and (product := self._product(x, bias)) is not None:
            return product
        return super().multiply(x, bias)

    def multiply_after_norm(
        self, norm: Norm, x: Tensor, residual: Tensor | None, bias: Tensor | None, gate: Gate | None = None
    ) -> tuple[Tensor, Tensor]:
        if self._product is not None and norm.weight is not None:
            activation = None if gate is None else gate.activation
            result = self._product.after_norm(x, residual, (norm.weight, norm.eps), bias, activation)
            if result is not None:
                return result
        return super().multiply_after_norm(norm, x, residual, bias, gate)
