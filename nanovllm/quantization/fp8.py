"""FP8 checkpoints as DeepSeek-V3 and Qwen3-FP8 have them, with a scale for each block of a matrix (DeepSeek-AI, 2024),
and AutoFP8's or Ministral 3's, with one for each matrix.

Owns the reading of their config and the layout of their tensors.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanovllm.layers.linear_method import LinearSpec
from nanovllm.layers.weight_specs import WeightSpec
from nanovllm.quantization.quantized_linear import QuantizedLinear, Rounding
from nanovllm.quantization.scheme import is_named, read_fields

FP8 = (torch.float8_e4m3fn,)
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)


class Fp8Scheme:
    def __init__(self, fields: Mapping[str, Any]) -> None:
        lists = ("modules_to_not_convert", "ignored_layers")
        known: dict[str, tuple[Any, ...]] = {
            "fmt": ("e4m3", "float8_e4m3fn"),
            "activation_scheme": ("dynamic", "static"),
            "dequantize": (False,),
            "scale_fmt": ("float", "ue8m0"),
        }
        others = "quant_method", "weight_block_size", "use_deepgemm", *lists
        read_fields(fields, "quantization_config of FP8", known | dict.fromkeys(others))
        size = fields.get("weight_block_size")
        self._method = Fp8(None if size is None else (size[0], size[1]), fields.get("activation_scheme") == "static")
        # Routers are no linear layers to transformers: DeepSeek-V3's stay as they are, and its config names none.
        named = (name for key in lists for name in fields.get(key) or ())
        self._dense = ("lm_head", "embed_tokens", "mlp.gate", *named)

    def method_of(self, name: str) -> "Fp8 | None":
        return None if is_named(name, self._dense) else self._method


@dataclass(frozen=True)
class Fp8:
    """block_size: outputs and inputs; None for one scale a matrix."""

    block_size: tuple[int, int] | None
    is_static: bool

    def __call__(self, spec: LinearSpec) -> QuantizedLinear:
        scale_name = "weight_scale_inv" if self.block_size else "weight_scale"
        return Fp8Linear(spec, self.block_size, self.is_static, scale_name)


class Fp8Linear(QuantizedLinear):
    """scale_name: of the scales, which the codes are multiplied by, also where it says "inv"."""

    def __init__(self, spec: LinearSpec, block_size: tuple[int, int] | None, is_static: bool, scale_name: str) -> None:
        self.block_size, self.scale_name = block_size, scale_name
        group_size = None if block_size is None else block_size[1]
        super().__init__(spec, "fp8", group_size, rounding=Rounding("fp8", group_size, is_static))

    def weights(self, part: int) -> Iterator[tuple[str, WeightSpec]]:
        size, inputs = self.spec.sizes[part], self.spec.in_features
        yield self.weight_spec("weight", part, (size, inputs), FP8, self.fill_codes, outputs=0)
        if self.block_size is None:
            yield from self._scale_specs(self.scale_name, "weight_scale_inv", part, self._fill_scale)
        else:
            blocks = (-(-size // self.block_size[0]), self.num_groups)
            outputs = None if size % self.block_size[0] else 0  # a block of two matrices could not be told apart
            yield self.weight_spec(self.scale_name, part, blocks, SCALES, self._fill_scale, outputs=outputs)
        if self.input_scale is not None:
            yield from self._scale_specs("input_scale", "activation_scale", part, self.fill_input_scale)

    def _scale_specs(
        self, name: str, other_name: str, part: int, fill: Callable[[int, Tensor], object]
    ) -> Iterator[tuple[str, WeightSpec]]:
        """One scale a matrix, by AutoFP8's name or by transformers' own."""
        _, weight_spec = named = self.weight_spec(name, part, (1,), SCALES, fill)
        yield named
        yield other_name, weight_spec._replace(instead_of=(f"{self.spec.names[part]}.{name}",))

    def _fill_scale(self, part: int, scale: Tensor) -> None:
        if scale.dtype == torch.uint8:  # exponents
            scale = scale.view(torch.float8_e8m0fnu)
        scale = scale.float()
        if self.block_size is None:
            self.fill_scale(part, scale.view(1, 1))
        else:
            self.fill_scale(part, scale.repeat_interleave(self.block_size[0], dim=0)[: self.spec.sizes[part]])
