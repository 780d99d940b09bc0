"""Checkpoints of NVIDIA's ModelOpt: FP8 with a scale for each matrix and for its inputs, and NVFP4.

Owns the reading of their config, which older ones have in a file beside it, hf_quant_config.json. What they say of a
KV cache in FP8, a scale for each layer, is read and left: a cache here has finer scales, and is in FP8 where
`kv_cache_dtype` says so.
"""

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nanovllm.layers.linear_method import LinearSpec
from nanovllm.layers.weight_specs import WeightSpec
from nanovllm.quantization.fp8 import Fp8Linear
from nanovllm.quantization.nvfp4 import Nvfp4, Nvfp4Linear
from nanovllm.quantization.quantized_linear import QuantizedLinear
from nanovllm.quantization.scheme import is_named, read_fields

_NVFP4 = Nvfp4("weight", "weight_scale_2", "input_scale", divides=False)


class ModelOptScheme:
    def __init__(self, fields: Mapping[str, Any]) -> None:
        others = "quant_method", "config_groups", "ignore", "exclude_modules", "kv_cache_scheme", "producer"
        known: dict[str, Any] = {"quant_algo": ("FP8", "NVFP4"), "kv_cache_quant_algo": ("FP8", None)}
        read_fields(fields, "quantization_config of ModelOpt", known | dict.fromkeys((*others, "group_size")))
        if "quant_algo" not in fields:
            raise NotImplementedError("quantization_config of ModelOpt: quant_algo is missing; FP8 and NVFP4 are known")
        has_kv_scales = bool(fields.get("kv_cache_scheme") or fields.get("kv_cache_quant_algo"))
        self._method = ModelOpt(fields["quant_algo"], has_kv_scales)
        names = (name for key in ("ignore", "exclude_modules") for name in fields.get(key) or ())
        patterns = (f"re:{fnmatch.translate(name)}" if "*" in name else name for name in names)
        self._dense = ("lm_head", "embed_tokens", *patterns)

    def method_of(self, name: str) -> "ModelOpt | None":
        return None if is_named(name, self._dense) else self._method


@dataclass(frozen=True)
class ModelOpt:
    algorithm: str
    has_kv_scales: bool

    def __call__(self, spec: LinearSpec) -> QuantizedLinear:
        if self.algorithm == "FP8":
            return ModelOptFp8Linear(spec, self.has_kv_scales)
        return ModelOptNvfp4Linear(spec, self.has_kv_scales)


class _WithKvScales(QuantizedLinear):
    """A scale beside the projection of keys, and of values, where a config says so."""

    has_kv_scales: bool

    def weights(self, part: int) -> Iterator[tuple[str, WeightSpec]]:
        yield from super().weights(part)
        for projection, name in (("k_proj", "k_scale"), ("v_proj", "v_scale")):
            if self.has_kv_scales and self.spec.names[part].endswith(projection):
                yield self.weight_spec(name, part, (1,), (torch.float32,), lambda part, scale: None)


class ModelOptFp8Linear(_WithKvScales, Fp8Linear):
    def __init__(self, spec: LinearSpec, has_kv_scales: bool) -> None:
        super().__init__(spec, block_size=None, is_static=True, scale_name="weight_scale")
        self.has_kv_scales = has_kv_scales


class ModelOptNvfp4Linear(_WithKvScales, Nvfp4Linear):
    def __init__(self, spec: LinearSpec, has_kv_scales: bool) -> None:
        super().__init__(spec, _NVFP4)
        self.has_kv_scales = has_kv_scales
