"""GGUFCheckpoint: a GGUF file seen as a Hugging Face checkpoint, with its config, names, row order and plain tensors.

Owns the way of a tensor from the file to the loader. Does not own the container (`model_files/gguf_file.py`), the
meaning of names and metadata (`gguf_architectures.py`), the block formats (`gguf_blocks.py`), nor the tokenizer.
Invariant: one tensor at a time is in memory, in the dtype that the model wants, and no page of the file stays.

llama.cpp rotates neighbouring pairs (0,1), (2,3) ... for some architectures; Hugging Face rotates halves (0,D/2),
(1,D/2+1) .... For those the conversion to GGUF reorders the rows of every query and key head; reading undoes it:

    Hugging Face rows of a head   a0 a1 a2 b0 b1 b2     ->     GGUF rows   a0 b0 a1 b1 a2 b2

For all others llama.cpp rotates halves itself, and the rows are as Hugging Face has them. Files of Gemma hold norm
weights with the 1 added that Hugging Face adds when it runs; reading subtracts it. Files of mixtures hold all experts
of a layer in one tensor; reading yields them one by one, or joins what Hugging Face has in one (`gguf_row.py`, `Join`).
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from nanovllm.model_files.gguf_file import GGUFFile, TensorInfo
from nanovllm.model_files.gguf_tokens import end_of_generation_ids
from nanovllm.weights.checkpoint import NOWHERE, Places
from nanovllm.weights.gguf_architectures import ROPE_FACTORS, read_architecture
from nanovllm.weights.gguf_blocks import PLAIN_DTYPES, dequantize
from nanovllm.weights.gguf_packed import PACKED_KINDS, PackedKind, unpack_codes, unpack_mxfp4
from nanovllm.weights.gguf_row import ROPE_FREQS, Join
from nanovllm.weights.prediction_heads import warn_of_prediction_heads

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output_norm.bias": "model.norm.bias",
    "output.weight": "lm_head.weight",
    "token_embd_norm.weight": "model.embedding_norm.weight",  # LFM2's last norm, in spite of the name
}
_LAYER = re.compile(r"blk\.(\d+)\.")
_MXFP4 = GGMLQuantizationType.MXFP4
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.([\w.]+?)(?:\.(weight|bias))?")
_NOT_PARAMETERS = (ROPE_FREQS, *ROPE_FACTORS)


class GGUFCheckpoint:
    """Checkpoint of a .gguf file. Raises ValueError or NotImplementedError that names what is not understood.

    config: as Hugging Face's config.json; generation_config: EOS, BOS and padding ids from the metadata.
    is_packed: matrices of the kinds that `gguf_packed.py` knows come as codes, scales and lows.
    """

    def __init__(self, path: Path, is_packed: bool = False) -> None:
        self.path = path
        self._file = GGUFFile(path)
        self._architecture, config = read_architecture(self._file)
        self._numbers = dict(self._read_numbers(config["num_hidden_layers"]))
        self.generation_config = _generation_config(self._file.metadata)
        seconds = {join.other for join in self._architecture.joins.values()}
        self._parameters = list(_parameters(self._file, config, seconds))
        self._unpacked_experts = self._experts_to_unpack()
        dtype = _dtype(info.quantization for info in self._parameters if _is_matrix(info))
        self.config: dict[str, Any] = {**config, "dtype": dtype, **self.generation_config}
        self._packed = self._packed_matrices() if is_packed else {}
        experts = None
        if any(map(self._stays_mxfp4, self._parameters)):
            dense = [f"model.layers.{layer}.mlp.experts" for layer in sorted(self._unpacked_experts)]
            experts = self.config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": dense}
        if is_packed:
            packed = {"quant_method": "gguf", "matrices": self._packed, "experts": experts}
            self.config["quantization_config"] = packed

    def tensors(self, dtype: torch.dtype, places: Places = NOWHERE) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (Hugging Face name, CPU tensor), one at a time; quantized tensors come in `dtype`.

        places: by name, memory that a quantized tensor of its shape and dtype is unpacked into.
        """
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            for info in self._parameters:
                yield from self._read(info, dtype, threads, places)
                self._file.forget_pages(info)
        for name, number in self._numbers.items():
            yield name, torch.tensor([number])

    def headers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As `tensors`, on the meta device."""
        for info in self._parameters:
            name, dtype = self._hf_name(info.name), PLAIN_DTYPES.get(info.quantization, torch.float32)
            layer = name.removesuffix(".weight")
            if layer in self._packed:
                row_bytes = info.num_bytes // info.shape[0]
                rows = torch.empty((info.shape[0], row_bytes), dtype=torch.uint8, device="meta")
                for suffix, part in unpack_codes(rows, info.quantization).items():
                    yield f"{layer}.{suffix}", part
            elif self._is_assembled(info):
                yield from self._assembled(info, lambda one: _empty(one, self._stays_mxfp4(one)))
            elif "{}" not in name:
                yield name, self._in_shape(info, torch.empty(info.shape, dtype=dtype, device="meta"))
            else:
                for expert in range(self._num_experts(info)):
                    yield name.format(expert), torch.empty(info.shape[1:], dtype=dtype, device="meta")
        yield from ((name, torch.empty(1, device="meta")) for name in self._numbers)

    def _read_numbers(self, num_layers: int) -> Iterator[tuple[str, float]]:
        """Tensors of one number that are in the metadata. Raises ValueError."""
        for key, name in self._architecture.numbers.items():
            given = self._file.metadata.get(key)
            numbers = given.tolist() if isinstance(given, np.ndarray) else given
            if not isinstance(numbers, list) or len(numbers) != num_layers or not all(map(_is_number, numbers)):
                raise ValueError(f"{self.path}: metadata {key} must have a number for each of {num_layers} layers")
            yield from ((f"model.layers.{layer}.{name}", number) for layer, number in enumerate(numbers))

    def _read(
        self, info: TensorInfo, dtype: torch.dtype, threads: Executor, places: Places
    ) -> Iterator[tuple[str, torch.Tensor]]:
        name, rows = self._hf_name(info.name), self._file.read_rows(info)
        if self._architecture.has_pairs and _module(info) in ("attn_q", "attn_k", "attn_qkv"):
            rows = self._in_halves(_module(info), rows.reshape(info.shape[0], -1))
        if (order := self._row_order(info)) is not None:
            rows = rows.reshape(info.shape[0], -1)[order]
        if (layer := name.removesuffix(".weight")) in self._packed:
            for suffix, part in unpack_codes(torch.from_numpy(rows), info.quantization).items():
                yield f"{layer}.{suffix}", part
        elif self._is_assembled(info):

            def numbers(one: TensorInfo) -> torch.Tensor:
                if self._stays_mxfp4(one):
                    return torch.from_numpy(self._file.read_rows(one)).view(*one.shape[:-1], -1)
                return dequantize(self._file.read_rows(one), one, dtype, threads)

            yield from self._assembled(info, numbers)
        elif "{}" in name:
            expert_info = replace(info, shape=info.shape[1:])
            for expert, expert_rows in enumerate(np.split(rows, self._num_experts(info))):
                expert_name = name.format(expert)
                yield expert_name, dequantize(expert_rows, expert_info, dtype, threads, places.get(expert_name))
        elif self._architecture.norm_offset and info.name.endswith("norm.weight") and not self._transform(info):
            yield name, dequantize(rows, info) - self._architecture.norm_offset
        else:
            yield name, self._in_shape(info, dequantize(rows, info, dtype, threads, places.get(name)))

    def _in_halves(self, module: str, rows: np.ndarray) -> np.ndarray:
        """Queries, keys, or both and values behind them."""
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        if module != "attn_qkv":
            return _undo_row_permutation(rows, heads if module == "attn_q" else kv_heads)
        size = len(rows) // (heads + 2 * kv_heads)
        queries, keys, values = np.split(rows, [heads * size, (heads + kv_heads) * size])
        halves = _undo_row_permutation(queries, heads), _undo_row_permutation(keys, kv_heads)
        return np.concatenate((*halves, values))

    def _is_assembled(self, info: TensorInfo) -> bool:
        return self._join(info) is not None or self._stays_mxfp4(info)

    def _assembled(
        self, info: TensorInfo, numbers: Callable[[TensorInfo], torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """What becomes of a tensor that is joined with another one, or stays in MXFP4. numbers: its own, or bytes."""
        name, join, whole = self._hf_name(info.name), self._join(info), numbers(info)
        if join is not None:
            other = info.name.replace(f".{_module(info)}.", f".{join.other}.")
            if other not in self._file.tensors:
                raise ValueError(f"{self.path} has no tensor {other} beside {info.name}")
            whole = join.make(whole, numbers(self._file.tensors[other]))
            self._file.forget_pages(self._file.tensors[other])
        if self._stays_mxfp4(info):
            yield from ((f"{name}_{part}", tensor) for part, tensor in unpack_mxfp4(whole).items())
        else:
            yield name, self._in_shape(info, whole)

    def _join(self, info: TensorInfo) -> Join | None:
        return self._architecture.joins.get(_module(info))

    def _stays_mxfp4(self, info: TensorInfo) -> bool:
        return (
            self._architecture.keeps_mxfp4
            and info.quantization == _MXFP4
            and len(info.shape) == 3
            and _layer(info) not in self._unpacked_experts
        )

    def _experts_to_unpack(self) -> set[int]:
        """Layers whose experts are not all of one kind."""
        experts = [info for info in self._file.tensors.values() if len(info.shape) == 3]
        return {_layer(info) for info in experts if info.quantization != _MXFP4}

    def _in_shape(self, info: TensorInfo, tensor: torch.Tensor) -> torch.Tensor:
        transform = self._transform(info)
        return tensor if transform is None else transform(tensor, self.config)

    def _transform(self, info: TensorInfo) -> Callable[[torch.Tensor, dict[str, Any]], torch.Tensor] | None:
        return self._architecture.transforms.get(_module(info))

    def _row_order(self, info: TensorInfo) -> list[int] | None:
        order = self._architecture.row_orders.get(_module(info))
        return None if order is None else order(self.config)

    def _packed_matrices(self) -> dict[str, PackedKind]:
        """By the layer's name, those that stay as they are; values that a file does not have are its keys."""
        names = {self._hf_name(info.name): info for info in self._parameters}
        packed = {
            name.removesuffix(".weight"): PACKED_KINDS[info.quantization]
            for name, info in names.items()
            if info.quantization in PACKED_KINDS
            and len(info.shape) == 2
            and self._transform(info) is None
            and "{}" not in name
        }
        for keys, kind in list(packed.items()):
            values = keys.replace(".k_proj", ".v_proj")
            if f"{values}.weight" not in names:
                packed[values] = kind
        return packed

    def _num_experts(self, info: TensorInfo) -> int:
        if len(info.shape) != 3:
            raise ValueError(f"{self.path}: tensor {info.name} of shape {info.shape} does not hold experts")
        return info.shape[0]

    def _hf_name(self, name: str) -> str:
        if (outer := self._architecture.outer_names.get(name, _NAMES.get(name))) is not None:
            return outer
        layer_tensor = _LAYER_TENSOR.fullmatch(name)
        names = self._architecture.layer_names
        if (start := _LAYER.match(name)) and (whole := names.get(name[start.end() :])):
            return f"model.layers.{start[1]}.{whole}"
        if layer_tensor is None or layer_tensor[2] not in names:
            raise ValueError(f"{self.path}: tensor {name} has no place in a {self._architecture.hf_class}")
        layer, module, kind = layer_tensor.groups()
        suffix = "" if kind is None or names[module].endswith("_bias") else f".{kind}"
        return f"model.layers.{layer}.{names[module]}{suffix}"


def _module(info: TensorInfo) -> str:
    """What follows the layer in a tensor's name, without its ending; empty for one of no layer."""
    layer_tensor = _LAYER_TENSOR.fullmatch(info.name)
    return "" if layer_tensor is None else layer_tensor[2]


def _layer(info: TensorInfo) -> int:
    layer = _LAYER.match(info.name)
    return -1 if layer is None else int(layer[1])


def _empty(info: TensorInfo, is_packed: bool) -> torch.Tensor:
    """Of the meta device, as `dequantize` gives it, or its bytes."""
    *rows, columns = info.shape
    size = info.num_bytes // math.prod(rows) if is_packed else columns
    dtype = torch.uint8 if is_packed else PLAIN_DTYPES.get(info.quantization, torch.float32)
    return torch.empty((*rows, size), dtype=dtype, device="meta")


def _parameters(file: GGUFFile, config: Mapping[str, Any], seconds: set[str]) -> Iterator[TensorInfo]:
    """The tensors of the model; those of layers that predict further tokens are left out, and that is said.

    seconds: names of those that are read with another one.
    """
    num_layers = config["num_hidden_layers"] if config.get("num_nextn_predict_layers") else math.inf
    left_out = 0
    for info in file.tensors.values():
        layer = _LAYER.match(info.name)
        if layer is not None and int(layer[1]) >= num_layers:
            left_out += 1
        elif info.name not in _NOT_PARAMETERS and _module(info) not in seconds:
            yield info
    warn_of_prediction_heads(left_out, file.path)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _is_matrix(info: TensorInfo) -> bool:
    """False for routers and biases of experts, which converters leave in float32 whatever the file's type is."""
    return len(info.shape) > 1 and not any(part in info.name for part in (".ffn_gate_inp", ".exp_probs_b", ".bias"))


def _dtype(matrix_kinds: Iterable[GGMLQuantizationType]) -> str:
    """The type that all matrices have; bfloat16 if they are mixed or quantized, which was the coarser rounding."""
    kinds = set(matrix_kinds)
    only = kinds.pop() if len(kinds) == 1 else None
    return str(PLAIN_DTYPES.get(only, torch.bfloat16)).removeprefix("torch.")


def _undo_row_permutation(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Bytes of a query or key projection (or its bias), from llama.cpp's pairs to Hugging Face's halves."""
    pairs = rows.reshape(num_heads, len(rows) // num_heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """What ends a text, BOS and padding ids, as generation_config.json has them."""
    result: dict[str, Any] = {}
    if stop_ids := end_of_generation_ids(metadata):
        result["eos_token_id"] = stop_ids[0] if len(stop_ids) == 1 else stop_ids
    for ours, theirs in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        if (token_id := metadata.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            result[ours] = token_id
    return result
