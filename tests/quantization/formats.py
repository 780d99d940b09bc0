"""Quantized tensors of one layer, as the writers of each format make them, beside the dense matrix that they mean.

compressed-tensors is asked itself. AWQ and GPTQ are packed here anew, word by word from their descriptions: their
libraries need a GPU, or a compiler.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Format:
    """make(weight [outputs, inputs] float32) -> (tensors by the name behind the layer's, the matrix they mean)."""

    config: Mapping[str, Any]
    make: Callable[[Tensor], tuple[Tensors, Tensor]]
    rounds_inputs: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


# --- compressed-tensors ---------------------------------------------------------------------------


def compressed(format: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None = None) -> Format:
    def make(weight: Tensor) -> tuple[Tensors, Tensor]:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
        scale, zero = _scales(weight, weights)
        dense = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        writer: Any = BaseCompressor.get_value_from_registry(format)
        tensors = writer.compress(dense, scheme)
        meant = writer.decompress(tensors, scheme)["weight"].float()
        if inputs is not None and not inputs.get("dynamic"):
            largest = 448 if inputs["type"] == "float" else 127
            tensors["input_scale"] = (8 + weight.abs().amax().view(1) / 10) / largest  # another one for each matrix
        return {name: tensor.contiguous() for name, tensor in tensors.items()}, meant

    group = {"targets": ["Linear"], "weights": dict(weights), "input_activations": inputs, "output_activations": None}
    config = {"quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
              "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None}  # fmt: skip
    return Format(config, make, rounds_inputs=inputs is not None)


def _scales(weight: Tensor, args: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """By the strategy: the scale that just holds the largest number, and the zero point."""
    outputs, inputs = weight.shape
    strategy = args["strategy"]
    height, width = {
        "tensor": (outputs, inputs),
        "channel": (1, inputs),
        "group": (1, args.get("group_size") or 1),
        "block": args.get("block_structure") or (1, 1),
    }[strategy]
    rows, columns = -(-outputs // height), -(-inputs // width)
    low, high = torch.zeros(2, rows, columns)
    for i in range(rows):
        for j in range(columns):
            block = weight[i * height : (i + 1) * height, j * width : (j + 1) * width]
            low[i, j], high[i, j] = min(block.min(), 0), max(block.max(), 0)
    is_float, bits = args["type"] == "float", args["num_bits"]
    if args.get("symmetric", True):
        scale = torch.maximum(-low, high) / (448 if is_float else 2 ** (bits - 1) - 1)
        zero = torch.zeros_like(scale)
    else:
        scale = (high - low) / (2**bits - 1)
        zero = (-(2 ** (bits - 1)) - low / scale).round()
    shape = (1,) if strategy == "tensor" else (rows, columns)
    zero_dtype = torch.float8_e4m3fn if is_float else torch.int8
    return scale.view(shape), zero.view(shape).to(zero_dtype)


FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
TOKEN = {"strategy": "token", "dynamic": True}


def _ints(bits: int, strategy: str, group_size: int | None, symmetric: bool) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": group_size, "symmetric": symmetric}


# --- AWQ and GPTQ ---------------------------------------------------------------------------------


def _rounded(weight: Tensor, bits: int, group_size: int, group_of_input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned codes [outputs, inputs], scales and zeros [outputs, groups]; some zeros are 0."""
    groups = int(group_of_input.max()) + 1
    scale, zero = torch.zeros(weight.shape[0], groups), torch.zeros(weight.shape[0], groups, dtype=torch.int64)
    for group in range(groups):
        own = weight[:, group_of_input == group]
        low, high = own.amin(1).clamp(max=0), own.amax(1).clamp(min=0)
        low[::3] = 0
        scale[:, group] = ((high - low) / (2**bits - 1)).half()
        zero[:, group] = (-low / scale[:, group]).round()
    codes = (weight / scale[:, group_of_input]).round().long() + zero[:, group_of_input]
    return codes.clamp(0, 2**bits - 1), scale, zero


def _words(numbers: Tensor, bits: int, places: list[int]) -> Tensor:
    """numbers [rows, n] -> int32 [rows, n * bits / 32]: number places[i] of each word's at bit i * bits."""
    per_word = 32 // bits
    words = torch.zeros(numbers.shape[0], numbers.shape[1] // per_word, dtype=torch.int64)
    for i, place in enumerate(places):
        words |= numbers[:, place::per_word] << (bits * i)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def awq(group_size: int) -> Format:
    def make(weight: Tensor) -> tuple[Tensors, Tensor]:
        group_of_input = torch.arange(weight.shape[1]) // group_size
        codes, scale, zero = _rounded(weight, 4, group_size, group_of_input)
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        tensors = {
            "qweight": _words(codes.t(), 4, order),
            "qzeros": _words(zero.t(), 4, order),
            "scales": scale.t().half().contiguous(),
        }
        return tensors, (codes - zero[:, group_of_input]) * scale[:, group_of_input]

    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return Format(config, make)


def gptq(bits: int, group_size: int, *, version: int = 1, desc_act: bool = False) -> Format:
    def make(weight: Tensor) -> tuple[Tensors, Tensor]:
        inputs = weight.shape[1]
        group_of_input = torch.arange(inputs) // group_size
        if desc_act:
            group_of_input = group_of_input[torch.randperm(inputs, generator=torch.Generator().manual_seed(3))]
        codes, scale, zero = _rounded(weight, bits, group_size, group_of_input)
        places = list(range(32 // bits))
        qzeros = _words(zero.t(), bits, places)
        if version == 1:  # one off each number of a word, by one subtraction
            qzeros = qzeros - int.from_bytes((17 if bits == 4 else 1,) * 4, "little")
        tensors = {
            "qweight": _words(codes, bits, places).t().contiguous(),
            "qzeros": qzeros,
            "scales": scale.t().half().contiguous(),
            "g_idx": group_of_input.int(),
        }
        return tensors, (codes - zero[:, group_of_input]) * scale[:, group_of_input]

    name = "gptq" if version == 1 else "gptq_v2"
    config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": desc_act, "sym": False,
              "checkpoint_format": name}  # fmt: skip
    return Format(config, make)


# --- FP8 with blocks ------------------------------------------------------------------------------


def fp8_blocks(size: int, scale_dtype: torch.dtype = torch.float32) -> Format:
    def make(weight: Tensor) -> tuple[Tensors, Tensor]:
        scale, _ = _scales(weight, {**FLOAT8, "strategy": "block", "block_structure": (size, size)})
        if scale_dtype != torch.float32:  # a power of two that is no less
            exponents = scale.log2().ceil()
            scale = 2.0**exponents
        by_cell = scale.repeat_interleave(size, 0)[: weight.shape[0]].repeat_interleave(size, 1)[:, : weight.shape[1]]
        codes = (weight / by_cell).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored = scale if scale_dtype == torch.float32 else (exponents + 127).to(torch.uint8)
        if scale_dtype == torch.float8_e8m0fnu:
            stored = stored.view(scale_dtype)
        return {"weight": codes, "weight_scale_inv": stored}, codes.float() * by_cell

    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [size, size]}
    return Format(config, make, rounds_inputs=True)


def fp8_matrices() -> Format:
    """As transformers names them: one scale for a matrix, and one for its inputs."""

    def make(weight: Tensor) -> tuple[Tensors, Tensor]:
        scale = weight.abs().amax().view(1) / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        input_scale = (8 + weight.abs().amax().view(1) / 10) / 448
        return {"weight": codes, "weight_scale_inv": scale, "activation_scale": input_scale}, codes.float() * scale

    config = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None, "dequantize": False,
              "modules_to_not_convert": ["model.vision_tower", "model.language_model.norm"]}  # fmt: skip
    return Format(config, make, rounds_inputs=True)


# --- NVFP4, and ModelOpt ----------------------------------------------------------------------------


def nvfp4(is_modelopt: bool = False) -> Format:
    """Packed by compressed-tensors; ModelOpt has the same bytes by other names, and the matrix's scale upside down."""

    def make(weight: Tensor) -> tuple[Tensors, Tensor]:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        matrix = 448 * 6 / weight.abs().amax().view(1)
        scale = (weight.unflatten(1, (-1, 16)).abs().amax(2) / 6 * matrix).to(torch.float8_e4m3fn)
        writer: Any = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
        dense = {"weight": weight, "weight_scale": scale.float(), "weight_global_scale": matrix}
        tensors = writer.compress(dense, scheme)
        numbers = unpack_fp4_from_uint8(tensors["weight_packed"], *weight.shape, dtype=torch.float32)
        meant = numbers * (scale.float() / matrix).repeat_interleave(16, dim=1)  # the writer itself would in bfloat16
        if is_modelopt:
            tensors = {"weight": tensors["weight_packed"], "weight_scale": tensors["weight_scale"],
                       "weight_scale_2": 1 / matrix, "input_scale": torch.ones(1)}  # fmt: skip
        return tensors, meant

    if is_modelopt:
        config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "group_size": 16}
    else:
        numbers = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
        group = {"targets": ["Linear"], "weights": numbers, "input_activations": None}
        config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ["lm_head"],
                  "quantization_status": "compressed", "config_groups": {"group_0": group}}  # fmt: skip
    return Format(config, make, rounds_inputs=False)


def modelopt_fp8() -> Format:
    def make(weight: Tensor) -> tuple[Tensors, Tensor]:
        scale = weight.abs().amax().view(1) / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        input_scale = (8 + weight.abs().amax().view(1) / 10) / 448
        return {"weight": codes, "weight_scale": scale, "input_scale": input_scale}, codes.float() * scale

    config = {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head", "*norm*"], "producer": {}}
    return Format(config, make, rounds_inputs=True)


FORMATS = {
    "NVFP4": nvfp4(),
    "NVFP4, ModelOpt": nvfp4(is_modelopt=True),
    "FP8, ModelOpt": modelopt_fp8(),
    "fp8, a scale a row, dynamic inputs": compressed(
        "float-quantized", {**FLOAT8, "strategy": "channel"}, {**FLOAT8, **TOKEN}
    ),
    "fp8, a scale a matrix, dynamic inputs": compressed(
        "float-quantized", {**FLOAT8, "strategy": "tensor"}, {**FLOAT8, **TOKEN}
    ),
    "fp8, a scale a matrix, static inputs": compressed(
        "float-quantized", {**FLOAT8, "strategy": "tensor"}, {**FLOAT8, "strategy": "tensor", "dynamic": False}
    ),
    "fp8, blocks, compressed": compressed(
        "float-quantized",
        {**FLOAT8, "strategy": "block", "block_structure": [16, 16]},
        {**FLOAT8, "strategy": "group", "group_size": 16, "dynamic": True},
    ),
    "fp8, weights alone": compressed("float-quantized", {**FLOAT8, "strategy": "channel"}),
    "int8, dynamic inputs": compressed("int-quantized", {**INT8, "strategy": "channel"}, {**INT8, **TOKEN}),
    "int8, static inputs": compressed(
        "int-quantized", {**INT8, "strategy": "channel"}, {**INT8, "strategy": "tensor", "dynamic": False}
    ),
    "int4, groups": compressed("pack-quantized", _ints(4, "group", 16, True)),
    "int4, groups, zero points": compressed("pack-quantized", _ints(4, "group", 8, False)),
    "int4, a scale a row": compressed("pack-quantized", _ints(4, "channel", None, True)),
    "int8, packed, zero points": compressed("pack-quantized", _ints(8, "group", 16, False)),
    "fp8, a scale a matrix, by transformers' names": fp8_matrices(),
    "fp8, blocks": fp8_blocks(16),
    "fp8, ragged blocks, exponents": fp8_blocks(20, torch.uint8),
    "fp8, blocks, e8m0": fp8_blocks(16, torch.float8_e8m0fnu),
    "AWQ": awq(16),
    "GPTQ, version 1": gptq(4, 16),
    "GPTQ, version 2": gptq(4, 8, version=2),
    "GPTQ, other order": gptq(4, 16, desc_act=True),
    "GPTQ, 8 bits": gptq(8, 16),
    "GPTQ, 8 bits, other order": gptq(8, 8, version=2, desc_act=True),
}
