"""MXFP4 (Open Compute Project, 2023) as gpt-oss's checkpoints have it: experts in e2m1, with a power of 2 for each 32.

Owns the reading of their config and the layout of their tensors: all experts in one, as in
`layers/interleaved_experts.py` but with outputs as rows. Invariant: the numbers are exactly those of the checkpoint.

    gate_up_proj_blocks  [num_experts, 2 * intermediate, hidden / 32, 16]   uint8: inputs 2 i and 2 i + 1 in byte i
    gate_up_proj_scales  [num_experts, 2 * intermediate, hidden / 32]       uint8: exponents, 127 added to each
    down_proj_blocks, down_proj_scales                                      likewise
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from math import log2
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels.quantized_linear import QuantizedWeight
from nanovllm.layers.interleaved_experts import in_turn
from nanovllm.layers.linear_method import LinearSpec
from nanovllm.layers.weight_specs import WeightSpec, WeightSpecs
from nanovllm.quantization.quantized_linear import QuantizedLinear, random_codes, usual_scale
from nanovllm.quantization.scheme import read_fields

_GROUP = 32


class Mxfp4Scheme:
    def __init__(self, fields: Mapping[str, Any]) -> None:
        known = {"quant_method": None, "modules_to_not_convert": None, "dequantize": (False,)}
        read_fields(fields, "quantization_config of MXFP4", known)
        self._dense = fields.get("modules_to_not_convert") or ()

    def method_of(self, name: str) -> "type[Mxfp4Linear] | None":
        is_dense = ".experts." not in name or any(fnmatch(name, f"{pattern}*") for pattern in self._dense)
        return None if is_dense else Mxfp4Linear


class Mxfp4Linear(QuantizedLinear):
    """All experts' matrices, one below the other."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec, "e2m1", _GROUP, scale_dtype=torch.uint8)
        self.is_by_group = False  # scale [groups, outputs], as a GPU reads it: neighbours are of a tile's outputs

    def stacked(self, name: str, num_experts: int) -> WeightSpecs:
        """The specs of two tensors that hold all experts; of gate and up, if an expert has both, in turn."""
        spec, per_expert = self.spec, len(self.spec.sizes) // num_experts
        shape = (num_experts, per_expert * spec.sizes[0], spec.in_features // _GROUP)

        def filled(fill: Callable[[int, Tensor], None], form: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
            def fill_all(tensor: Tensor) -> None:
                for expert in range(num_experts):
                    rows = form(tensor[expert].to(self.codes.device))
                    parts = (rows,) if per_expert == 1 else in_turn(rows, 0, range(spec.sizes[0]))
                    for part, matrix in enumerate(parts, expert * per_expert):
                        fill(part, matrix)

            return fill_all

        more: dict[str, Any] = {"dtypes": (torch.uint8,), "layer": self}
        blocks, exponent = (*shape, _GROUP // 2), round(log2(usual_scale("e2m1", spec.in_features)))
        more["stand_in"] = lambda generator: random_codes(blocks, torch.uint8, generator)
        yield f"{name}_blocks", WeightSpec(blocks, filled(self.fill_codes, _repacked), **more)
        more["stand_in"] = lambda generator: torch.full(shape, 127 + exponent, dtype=torch.uint8)
        yield f"{name}_scales", WeightSpec(shape, filled(self.fill_scale, lambda scales: scales), **more)

    def finish(self) -> None:
        super().finish()
        if self.codes.is_cuda:
            self.scale.data, self.is_by_group = self.scale.t().contiguous(), True

    @property
    def weight(self) -> QuantizedWeight:
        weight = super().weight
        return weight._replace(scale=weight.scale.t()) if self.is_by_group else weight


def _repacked(blocks: Tensor) -> Tensor:
    """blocks [outputs, groups, 16], neighbours in a byte -> [outputs, inputs / 2], inputs i and i + 16 in a byte."""
    first, second = torch.stack((blocks & 15, blocks >> 4), dim=3).flatten(2).split(_GROUP // 2, dim=2)
    return (first | second << 4).flatten(1)
