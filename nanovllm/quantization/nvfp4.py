"""NVFP4 (NVIDIA, 2025): weights in e2m1, a scale in e4m3 for each 16 of them, and one in float32 for the matrix.

Owns the layout of their tensors, by the names of compressed-tensors and of ModelOpt. Invariant: the numbers are exactly
those of the checkpoint: e2m1 is kept as e4m3, which holds all of it. Inputs stay as they are, also where a checkpoint
has scales for them: only Blackwell multiplies e2m1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.kernels.quantized_linear import E2M1
from nanovllm.layers.linear_method import LinearSpec
from nanovllm.layers.weight_specs import WeightSpec
from nanovllm.quantization.quantized_linear import QuantizedLinear, usual_scale

_GROUP = 16


@dataclass(frozen=True)
class Nvfp4:
    """The names of a matrix's tensors. divides: by the matrix's scale, which ModelOpt multiplies by."""

    codes: str = "weight_packed"
    matrix_scale: str = "weight_global_scale"
    input_scale: str | None = "input_global_scale"
    divides: bool = True

    def __call__(self, spec: LinearSpec) -> QuantizedLinear:
        if spec.in_features % _GROUP:
            raise ValueError(f"{', '.join(spec.names)}: {spec.in_features} inputs are no multiple of {_GROUP}")
        return Nvfp4Linear(spec, self)


class Nvfp4Linear(QuantizedLinear):
    def __init__(self, spec: LinearSpec, form: Nvfp4) -> None:
        super().__init__(spec, "fp8", _GROUP)
        self.form = form
        self._scales: dict[int, list[Tensor]] = {}  # by matrix, what has come of them: they are filled together

    def weights(self, part: int) -> Iterator[tuple[str, WeightSpec]]:
        form, size, inputs = self.form, self.spec.sizes[part], self.spec.in_features
        yield self.weight_spec(form.codes, part, (size, inputs // 2), (torch.uint8,), self._fill_pairs, outputs=0)
        groups, eights = (size, inputs // _GROUP), (torch.float8_e4m3fn,)
        yield self.weight_spec("weight_scale", part, groups, eights, self._take_scale, outputs=0, stand_in=1.0)
        scale = usual_scale("e2m1", inputs)
        scale = 1 / scale if form.divides else scale
        floats = (torch.float32,)
        yield self.weight_spec(form.matrix_scale, part, (1,), floats, self._take_matrix_scale, stand_in=scale)
        if form.input_scale is not None:
            yield self.weight_spec(form.input_scale, part, (1,), (torch.float32,), lambda part, tensor: None)

    def _fill_pairs(self, part: int, pairs: Tensor) -> None:
        """pairs: two inputs in a byte, the first in its lower half."""
        values = torch.tensor((*E2M1, *(-value for value in E2M1)), device=pairs.device)
        codes = torch.stack((pairs & 15, pairs >> 4), dim=2).flatten(1)
        self.fill_codes(part, values.to(torch.float8_e4m3fn).view(torch.uint8)[codes.long()].view(torch.float8_e4m3fn))

    def _take_scale(self, part: int, scale: Tensor) -> None:
        self._take(part, scale.float())

    def _take_matrix_scale(self, part: int, scale: Tensor) -> None:
        self._take(part, (1 / scale if self.form.divides else scale).view(1, 1))

    def _take(self, part: int, scale: Tensor) -> None:
        taken = self._scales.setdefault(part, [])
        taken.append(scale)
        if len(taken) == 2:
            self.fill_scale(part, taken[0] * taken[1])
            del self._scales[part]
