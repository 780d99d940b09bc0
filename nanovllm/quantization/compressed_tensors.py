"""compressed-tensors checkpoints, as llm-compressor writes them: 8-bit floats and integers, 4 and 8 bits packed.

Owns the reading of their config (which layers, and in which of the forms) and the layout of their tensors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels.quantized_linear import pack_int4
from nanovllm.layers.linear_method import LinearSpec
from nanovllm.layers.weight_specs import WeightSpec
from nanovllm.quantization.fp8 import FP8, SCALES
from nanovllm.quantization.nvfp4 import Nvfp4
from nanovllm.quantization.quantized_linear import QuantizedLinear, Rounding
from nanovllm.quantization.scheme import is_named, read_fields
from nanovllm.quantization.words import signed, unpack_words

_WHERE = "quantization_config of compressed-tensors"
_UNPACKED = ("float-quantized", "int-quantized", "naive-quantized")
_NVFP4 = "nvfp4-pack-quantized"
_FORMATS = (*_UNPACKED, "pack-quantized", _NVFP4)
_NUMBERS_ANY = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")


class CompressedTensorsScheme:
    def __init__(self, fields: Mapping[str, Any]) -> None:
        read_fields(
            fields,
            _WHERE,
            {
                **dict.fromkeys(("quant_method", "config_groups", "ignore", "global_compression_ratio", "version")),
                **{"format": (*_FORMATS, "mixed-precision"), "quantization_status": ("compressed", "frozen")},
                **{"sparsity_config": (None, {}), "transform_config": (None, {}), "kv_cache_scheme": (None,)},
            },
        )
        groups = fields.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise ValueError(f"{_WHERE}: config_groups={groups!r} must name at least one group of layers")
        self._ignored = tuple(fields.get("ignore") or ())
        self._groups = [
            (tuple(group["targets"]), _read_group(group, f"{_WHERE}, {name}", fields.get("format")))
            for name, group in groups.items()
        ]

    def method_of(self, name: str) -> "Compressed | Nvfp4 | None":
        if is_named(name, self._ignored) or name.endswith("embed_tokens"):
            return None
        for targets, method in self._groups:
            if is_named(name, targets):
                return method
        return next((method for targets, method in self._groups if "Linear" in targets), None)


@dataclass(frozen=True)
class Compressed:
    """kind: as in QuantizedLinear. strategy: what a scale is for, "tensor", "channel", "group" or "block"."""

    kind: str
    strategy: str
    is_packed: bool
    group_size: int | None = None
    block_size: tuple[int, int] | None = None
    has_zeros: bool = False
    has_order: bool = False
    rounding: Rounding | None = None

    def __call__(self, spec: LinearSpec) -> QuantizedLinear:
        return PackedCompressedLinear(spec, self) if self.is_packed else CompressedLinear(spec, self)


def _read_group(group: Mapping[str, Any], where: str, format: str | None) -> "Compressed | Nvfp4":
    read_fields(group, where, dict.fromkeys(("targets", "weights", "input_activations", "format")))
    format = group.get("format") or format
    if format not in _FORMATS:
        raise NotImplementedError(f"{where}: format={format!r} is not supported")
    weights = group["weights"]
    if format == _NVFP4:
        numbers = {"num_bits": (4,), "type": ("float",), "strategy": ("tensor_group",), "group_size": (16,)}
        others = {"symmetric": (True,), "dynamic": (False, None), **dict.fromkeys(_NUMBERS_ANY)}
        read_fields(weights, f"{where}, weights", numbers | others)
        return Nvfp4(input_scale=None if group.get("input_activations") is None else "input_global_scale")
    read_fields(
        weights,
        f"{where}, weights",
        {
            **dict.fromkeys((*_NUMBERS_ANY, "group_size", "block_structure", "actorder", "symmetric")),
            **{"num_bits": (4, 8), "type": ("int", "float"), "dynamic": (False, None)},
            **{"strategy": ("tensor", "channel", "group", "block")},
        },
    )
    bits, is_float, strategy = weights["num_bits"], weights.get("type", "int") == "float", weights["strategy"]
    is_packed, has_zeros = format == "pack-quantized", not weights.get("symmetric", True)
    if is_float and (bits != 8 or is_packed):
        raise NotImplementedError(f"{where}: {bits}-bit floats in the form {format!r} are not supported")
    if not is_packed and (bits != 8 or has_zeros):
        raise NotImplementedError(f"{where}: {bits}-bit integers with zero points in the form {format!r}")
    rounding = _read_rounding(group.get("input_activations"), where)
    if is_packed and rounding is not None:
        raise NotImplementedError(f"{where}: input_activations of packed weights are not supported")
    block = weights.get("block_structure") if strategy == "block" else None
    return Compressed(
        kind="fp8" if is_float else f"int{bits}",
        strategy=strategy,
        is_packed=is_packed,
        group_size=weights["group_size"] if strategy == "group" else block[1] if block else None,
        block_size=(block[0], block[1]) if block else None,
        has_zeros=has_zeros,
        has_order=weights.get("actorder") in ("group", "dynamic", True),
        rounding=rounding,
    )


def _read_rounding(inputs: Mapping[str, Any] | None, where: str) -> Rounding | None:
    if inputs is None:
        return None
    read_fields(
        inputs,
        f"{where}, input_activations",
        {
            **dict.fromkeys((*_NUMBERS_ANY, "group_size", "actorder")),
            **{"num_bits": (8,), "type": ("int", "float"), "dynamic": (False, True), "symmetric": (True,)},
            **{"strategy": ("tensor", "token", "group")},
        },
    )
    kind = "fp8" if inputs.get("type") == "float" else "int8"
    if not inputs.get("dynamic"):
        if inputs["strategy"] != "tensor":
            raise NotImplementedError(f"{where}: static scales of inputs by {inputs['strategy']} are not supported")
        return Rounding(kind, is_static=True)
    if inputs["strategy"] == "tensor":
        raise NotImplementedError(f"{where}: one scale for all tokens of a step would mix requests")
    return Rounding(kind, inputs["group_size"] if inputs["strategy"] == "group" else None)


class CompressedLinear(QuantizedLinear):
    """8-bit codes as they are, with scales for the matrix, its outputs, groups or blocks."""

    def __init__(self, spec: LinearSpec, form: Compressed) -> None:
        super().__init__(spec, form.kind, form.group_size, rounding=form.rounding)
        self.form = form

    def weights(self, part: int) -> Iterator[tuple[str, WeightSpec]]:
        size, inputs = self.spec.sizes[part], self.spec.in_features
        codes = FP8 if self.kind == "fp8" else (torch.int8,)
        yield self.weight_spec("weight", part, (size, inputs), codes, self.fill_codes, outputs=0)
        block_size = self.form.block_size[0] if self.form.block_size is not None else 1
        outputs = None if self.form.strategy == "tensor" or size % block_size else 0
        yield self.weight_spec("weight_scale", part, self._scale_shape(size), SCALES, self._fill_scale, outputs=outputs)
        if self.input_scale is not None:
            yield self.weight_spec("input_scale", part, (1,), SCALES, self.fill_input_scale)

    def _scale_shape(self, size: int) -> tuple[int, ...]:
        if self.form.block_size is not None:
            return (-(-size // self.form.block_size[0]), self.num_groups)
        return (1,) if self.form.strategy == "tensor" else (size, self.num_groups)

    def _fill_scale(self, part: int, scale: Tensor) -> None:
        scale = scale.float()
        if self.form.block_size is not None:
            scale = scale.repeat_interleave(self.form.block_size[0], dim=0)[: self.spec.sizes[part]]
        self.fill_scale(part, scale.view(1, 1) if self.form.strategy == "tensor" else scale)


class PackedCompressedLinear(QuantizedLinear):
    """4 or 8 bits in 32-bit words along the inputs, and zero points in words along the outputs."""

    def __init__(self, spec: LinearSpec, form: Compressed) -> None:
        super().__init__(spec, form.kind, form.group_size, form.has_zeros, form.has_order)
        self.bits = 4 if form.kind == "int4" else 8
        self.form = form

    def weights(self, part: int) -> Iterator[tuple[str, WeightSpec]]:
        size, inputs, groups = self.spec.sizes[part], self.spec.in_features, self.num_groups
        words, per_word = (torch.int32,), 32 // self.bits
        yield self.weight_spec("weight_packed", part, (size, inputs // per_word), words, self._fill_words, outputs=0)
        if self.form.strategy == "tensor":
            yield self.weight_spec(
                "weight_scale", part, (1,), SCALES, lambda part, t: self.fill_scale(part, t.view(1, 1))
            )
        else:
            yield self.weight_spec("weight_scale", part, (size, groups), SCALES, self.fill_scale, outputs=0)
        integers = (torch.int64, torch.int32)
        yield self.weight_spec(
            "weight_shape", part, (2,), integers, self._check_shape, stand_in=torch.tensor([size, inputs])
        )
        if self.zero is not None:
            shape, outputs = (-(-size // per_word), groups), None if size % per_word else 0
            yield self.weight_spec("weight_zero_point", part, shape, words, self._fill_zeros, outputs=outputs)
        if self.form.has_order:
            in_order = self.groups_of_neighbours()
            yield self.weight_spec("weight_g_idx", part, (inputs,), integers[::-1], self.fill_groups, stand_in=in_order)

    def _check_shape(self, part: int, shape: Tensor) -> None:
        expected = [self.spec.sizes[part], self.spec.in_features]
        joined = [sum(self.spec.sizes), self.spec.in_features]
        if not shape.is_meta and shape.tolist() not in (expected, joined):
            name = f"{self.spec.names[part]}.weight_shape"
            raise ValueError(f"{name!r} says {shape.tolist()} in the checkpoint; the config says {expected}")

    def _fill_words(self, part: int, words: Tensor) -> None:
        values = signed(unpack_words(words, self.bits, dim=1), self.bits)
        self.fill_codes(part, pack_int4(values) if self.bits == 4 else values)

    def _fill_zeros(self, part: int, words: Tensor) -> None:
        self.fill_zero(part, signed(unpack_words(words, self.bits, dim=0), self.bits)[: self.spec.sizes[part]])
