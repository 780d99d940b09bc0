"""GGUFCheckpoint: a GGUF file seen as a Hugging Face checkpoint, with its config, names, row order and plain tensors.

Owns the meaning of GGUF metadata and tensors for the architectures of its table. Does not own the container
(`model_files/gguf_file.py`) nor the tokenizer (`model_files/gguf_tokenizer.py`). Invariant: what is not understood is
refused by name, metadata and tensors alike; nothing that changes the mathematics is skipped.

llama.cpp rotates neighbouring pairs (0,1), (2,3) ...; Hugging Face rotates halves (0,D/2), (1,D/2+1) .... For its
`llama` architecture the conversion to GGUF therefore reorders the rows of every query and key head; reading undoes it:

    Hugging Face rows of a head   a0 a1 a2 b0 b1 b2     ->     GGUF rows   a0 b0 a1 b1 a2 b2

For all others llama.cpp rotates halves itself, and the rows are as Hugging Face has them. Files of `gemma3` hold norm
weights with the 1 added that Hugging Face adds when it runs; reading subtracts it. Files of `qwen3moe`, and of Mixtral,
which call themselves `llama`, hold all experts of a layer in one tensor; reading yields them one by one.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType

from nanovllm.model_files.gguf_file import GGUFFile, TensorInfo

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_MODEL_TYPES = {  # where Hugging Face's word is another
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Gemma3ForCausalLM": "gemma3_text",
}

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OWN_LAYER_NAMES = {
    "Gemma3ForCausalLM": {
        "ffn_norm": "pre_feedforward_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    "Qwen3MoeForCausalLM": {
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_exps": "mlp.experts.{}.gate_proj",
        "ffn_up_exps": "mlp.experts.{}.up_proj",
        "ffn_down_exps": "mlp.experts.{}.down_proj",
    },
    "MixtralForCausalLM": {
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    },
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FREQS = "rope_freqs.weight"  # Llama 3's frequency divisors: part of the config here, not a parameter

# Metadata under "<architecture>." that `_hf_config` reads, or that says nothing a forward pass needs.
_READ_KEYS = (
    *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "attention.causal", "rope.dimension_count", "rope.freq_base"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scale_linear"),
    *("rope.scaling.finetuned", "expert_count", "expert_used_count"),
)
_OWN_READ_KEYS = {
    "gemma3": (
        *("attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"),
        "final_logit_softcapping",
    ),
    "qwen3moe": ("expert_feed_forward_length",),
}

# llama.cpp writes only the divisors of Llama 3's scaling; these constants of its formula are the same in every release.
_LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


# 1024 blocks of 32 numbers stay in a core's cache, and are as many as torch computes without waking its other threads:
# those wait for each other after every operation, which on a busy machine made reading a hundred times slower.
_BLOCKS_AT_ONCE = 1024


class GGUFCheckpoint:
    """Checkpoint of a .gguf file. Raises ValueError or NotImplementedError that names what is not understood.

    config: as Hugging Face's config.json; generation_config: EOS, BOS and padding ids from the metadata.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GGUFFile(path)
        self._prefix = self._check_architecture()
        self._hf_class = _ARCHITECTURES[self._prefix]
        if self._prefix == "llama" and self._get("expert_count", 0):
            self._hf_class = "MixtralForCausalLM"
        self.config = self._hf_config()
        self.generation_config = _generation_config(self._file.metadata)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (Hugging Face name, CPU tensor), one at a time; quantized tensors come as float32."""
        heads = {"attn_q": self.config["num_attention_heads"], "attn_k": self.config["num_key_value_heads"]}
        for info in self._file.tensors.values():
            if info.name == _ROPE_FREQS:
                continue
            rows = self._file.read_rows(info)
            layer_tensor = _LAYER_TENSOR.fullmatch(info.name)
            if self._prefix == "llama" and layer_tensor and layer_tensor[2] in heads:
                rows = _undo_row_permutation(rows.reshape(info.shape[0], -1), heads[layer_tensor[2]])
            name = self._hf_name(info.name)
            if "{}" in name:
                expert_info = replace(info, shape=info.shape[1:])
                for expert, expert_rows in enumerate(np.split(rows, self._num_experts(info))):
                    yield name.format(expert), dequantize(expert_rows, expert_info)
            elif self._prefix == "gemma3" and info.name.endswith("norm.weight"):
                yield name, dequantize(rows, info) - 1
            else:
                yield name, dequantize(rows, info)

    def headers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As `tensors`, on the meta device."""
        for info in self._file.tensors.values():
            if info.name == _ROPE_FREQS:
                continue
            name, dtype = self._hf_name(info.name), _TORCH_DTYPES.get(info.quantization, torch.float32)
            if "{}" not in name:
                yield name, torch.empty(info.shape, dtype=dtype, device="meta")
                continue
            for expert in range(self._num_experts(info)):
                yield name.format(expert), torch.empty(info.shape[1:], dtype=dtype, device="meta")

    def _num_experts(self, info: TensorInfo) -> int:
        if len(info.shape) != 3:
            raise ValueError(f"{self.path}: tensor {info.name} of shape {info.shape} does not hold experts")
        return info.shape[0]

    def _check_architecture(self) -> str:
        metadata = self._file.metadata
        architecture = metadata.get("general.architecture")
        if architecture not in _ARCHITECTURES:
            raise NotImplementedError(
                f"{self.path}: GGUF architecture {architecture!r} is not supported; "
                f"supported: {', '.join(_ARCHITECTURES)}"
            )
        if metadata.get("general.type", "model") != "model":
            raise NotImplementedError(f"{self.path} holds a {metadata['general.type']!r}, not a model")
        if metadata.get("split.count", 1) > 1:
            raise NotImplementedError(
                f"{self.path} is one of {metadata['split.count']} GGUF shards, which are not read: join them first "
                "with llama.cpp's `llama-gguf-split --merge`"
            )
        prefix = architecture + "."
        known = {prefix + key for key in (*_READ_KEYS, *_OWN_READ_KEYS.get(architecture, ()))}
        for key, value in metadata.items():
            if key.startswith(prefix) and key not in known:
                raise NotImplementedError(f"{self.path}: metadata {key} = {value} is not understood, so not run")
        return architecture

    def _hf_name(self, name: str) -> str:
        if name in _NAMES:
            return _NAMES[name]
        layer_tensor = _LAYER_TENSOR.fullmatch(name)
        names = _LAYER_NAMES | _OWN_LAYER_NAMES.get(self._hf_class, {})
        if layer_tensor is None or layer_tensor[2] not in names:
            raise ValueError(f"{self.path}: tensor {name} has no place in a {self._hf_class}")
        layer, module, kind = layer_tensor.groups()
        return f"model.layers.{layer}.{names[module]}.{kind}"

    def _get(self, key: str, default: Any = None) -> Any:
        """Metadata `<architecture>.<key>`; required if there is no default."""
        value = self._file.metadata.get(f"{self._prefix}.{key}", default)
        if value is None:
            raise ValueError(f"{self.path}: metadata {self._prefix}.{key} is missing")
        if isinstance(value, np.ndarray):  # one number a layer
            if len(set(value.tolist())) != 1:
                raise NotImplementedError(f"{self.path}: {self._prefix}.{key} differs between layers: {value.tolist()}")
            return value[0].item()
        return value

    def _hf_config(self) -> dict[str, Any]:
        tensors = self._file.tensors
        if "token_embd.weight" not in tensors:
            raise ValueError(f"{self.path} has no tensor token_embd.weight")
        num_heads, hidden_size = self._get("attention.head_count"), self._get("embedding_length")
        head_dim = self._get("attention.key_length", hidden_size // num_heads)
        for key, supported in (
            ("attention.value_length", head_dim),
            ("rope.dimension_count", head_dim),
            ("attention.causal", True),
            *(() if self._has_experts else (("expert_count", 0),)),
        ):
            if self._get(key, supported) != supported:
                raise NotImplementedError(
                    f"{self.path}: {self._prefix}.{key} = {self._get(key)} is not supported, only {supported} is here"
                )
        config = {
            "architectures": [self._hf_class],
            "model_type": _MODEL_TYPES.get(self._hf_class, self._prefix),
            "vocab_size": tensors["token_embd.weight"].shape[0],
            "hidden_size": hidden_size,
            "intermediate_size": self._get("feed_forward_length"),
            "num_hidden_layers": self._get("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._get("attention.head_count_kv", num_heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._get("context_length"),
            "rms_norm_eps": self._get("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._get("rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(head_dim),
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
            "dtype": _dtype(info.quantization for info in tensors.values() if _is_matrix(info)),
        }
        if self._has_experts:
            config |= self._expert_config()
        if self._prefix == "gemma3":
            config |= self._gemma3_config(head_dim)
        return config | _generation_config(self._file.metadata)

    @property
    def _has_experts(self) -> bool:
        return self._hf_class in ("MixtralForCausalLM", "Qwen3MoeForCausalLM")

    def _expert_config(self) -> dict[str, Any]:
        """For both families llama.cpp lets the weights of a token's experts sum to one."""
        fields = {
            "num_local_experts": self._get("expert_count"),
            "num_experts_per_tok": self._get("expert_used_count"),
        }
        if self._prefix == "qwen3moe":
            fields |= {"moe_intermediate_size": self._get("expert_feed_forward_length"), "norm_topk_prob": True}
        return fields

    def _gemma3_config(self, head_dim: int) -> dict[str, Any]:
        """What Gemma 3 has beside the others. The defaults are llama.cpp's: files before mid 2025 hold no pattern."""
        num_layers = self._get("block_count")
        window = self._get("attention.sliding_window", 0) or None
        pattern = self._file.metadata.get("gemma3.attention.sliding_window_pattern", 6)
        if isinstance(pattern, int):
            has_window = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
        else:
            has_window = [bool(flag) for flag in pattern]
        is_27b = num_layers == 62  # the one size whose queries are not scaled by the head dimension; no metadata say so
        scaling = self._rope_scaling(head_dim)
        return {
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_act": None,
            "sliding_window": window,
            "layer_types": [
                "sliding_attention" if window is not None and flag else "full_attention" for flag in has_window
            ],
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "default",
                    **(scaling or {}),
                    "rope_theta": self._get("rope.freq_base", 10000.0),
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": self._get("rope.freq_base_swa", 10000.0)},
            },
            "rope_theta": None,
            "rope_scaling": None,
            "query_pre_attn_scalar": (
                self._get("embedding_length") // self._get("attention.head_count") if is_27b else head_dim
            ),
            "final_logit_softcapping": self._get("final_logit_softcapping", 0.0) or None,
            "attention_bias": "blk.0.attn_q.bias" in self._file.tensors,
        }

    def _rope_scaling(self, head_dim: int) -> dict[str, Any] | None:
        kind = self._get("rope.scaling.type", "none")
        factor = self._get("rope.scaling.factor", self._get("rope.scale_linear", 1.0))
        if _ROPE_FREQS in self._file.tensors:
            if kind != "none":
                raise NotImplementedError(f"{self.path} has both {_ROPE_FREQS} and rope.scaling.type {kind!r}")
            return self._llama3_scaling(head_dim)
        if kind == "none" and factor in (0.0, 1.0):
            return None
        if kind in ("none", "linear"):  # files older than rope.scaling.type have a factor only
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            original = self._get("rope.scaling.original_context_length")
            return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        raise NotImplementedError(f"{self.path}: rope.scaling.type {kind!r} is not supported (none, linear, yarn are)")

    def _llama3_scaling(self, head_dim: int) -> dict[str, Any] | None:
        """Find the Llama 3 scaling whose divisors are those in the file, or refuse them."""
        info = self._file.tensors[_ROPE_FREQS]
        divisors = dequantize(self._file.read_rows(info), info).flatten().double()
        scaling = {"rope_type": "llama3", "factor": divisors.max().item(), **_LLAMA3_CONSTANTS}
        expected = llama3_divisors(self._get("rope.freq_base", 10000.0), head_dim, scaling)
        if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
            raise NotImplementedError(f"{self.path}: {_ROPE_FREQS} is not Llama 3's scaling, the only one supported")
        return None if scaling["factor"] == 1.0 else scaling


def llama3_divisors(theta: float, head_dim: int, scaling: dict[str, Any]) -> torch.Tensor:
    """What Llama 3's scaling divides each rotary frequency by. Returns float64 [head_dim / 2].

    Wavelengths beyond original length / low_freq_factor are divided by `factor`, those below original length /
    high_freq_factor by 1, and those between by an interpolation (Llama 3.1 reference code, `apply_scaling`).
    """
    wavelengths = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    smooth = smooth.clamp(0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def dequantize(rows: np.ndarray, info: TensorInfo) -> torch.Tensor:
    """Turn a tensor's bytes (uint8 [rows, bytes of a row]) into numbers. Returns a CPU tensor of `info.shape`.

    Plain floats keep their type and stay mapped; quantized blocks become float32, bit for bit as `gguf.quants` has
    them. The simplest block formats are unpacked here, three times faster; all others by `gguf.quants`.
    """
    kind = info.quantization
    if kind in _TORCH_DTYPES:
        return torch.from_numpy(rows).view(_TORCH_DTYPES[kind]).reshape(info.shape)
    if kind in _BLOCK_UNPACKERS:
        block_bytes, unpack = _BLOCK_UNPACKERS[kind]
        blocks = torch.from_numpy(rows).view(-1, block_bytes)
        values = torch.empty(len(blocks), 32)
        for some_blocks, some_values in zip(blocks.split(_BLOCKS_AT_ONCE), values.split(_BLOCKS_AT_ONCE), strict=True):
            unpack(some_blocks, some_values)
        return values.view(info.shape)
    try:
        return torch.from_numpy(quants.dequantize(rows, kind)).reshape(info.shape)
    except NotImplementedError:
        raise NotImplementedError(
            f"tensor {info.name} is quantized as {kind.name}, which the installed gguf package cannot unpack: "
            "update it (pip install -U gguf) or use a file of another quantization"
        ) from None


# Each writes the numbers of `blocks` (uint8 [n, bytes of a block]) to `values` (float32 [n, 32]).
def _unpack_q4_0(blocks: torch.Tensor, values: torch.Tensor) -> None:
    scales = _unpack_q4(blocks, values, header_bytes=2)
    values.sub_(8).mul_(scales)


def _unpack_q4_1(blocks: torch.Tensor, values: torch.Tensor) -> None:
    headers = _unpack_q4(blocks, values, header_bytes=4)
    values.mul_(headers[:, :1]).add_(headers[:, 1:])


def _unpack_q8_0(blocks: torch.Tensor, values: torch.Tensor) -> None:
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    values.copy_(blocks[:, 2:].view(torch.int8)).mul_(scales)


def _unpack_q4(blocks: torch.Tensor, values: torch.Tensor, header_bytes: int) -> torch.Tensor:
    """Write 4-bit values as 0 .. 15, low nibbles first. Returns the headers, float32 [n, header_bytes / 2]."""
    packed = blocks[:, header_bytes:].contiguous().view(torch.int32)  # eight nibbles at a time
    nibbles = torch.stack((packed & 0x0F0F0F0F, (packed >> 4) & 0x0F0F0F0F), dim=1)
    values.copy_(nibbles.view(torch.uint8).view(-1, 32))
    return blocks[:, :header_bytes].contiguous().view(torch.float16).float()


_TORCH_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_BLOCK_UNPACKERS: dict[GGMLQuantizationType, tuple[int, Callable[[torch.Tensor, torch.Tensor], None]]] = {
    GGMLQuantizationType.Q4_0: (18, _unpack_q4_0),
    GGMLQuantizationType.Q4_1: (20, _unpack_q4_1),
    GGMLQuantizationType.Q8_0: (34, _unpack_q8_0),
}


def _is_matrix(info: TensorInfo) -> bool:
    """False for the router, too, which converters leave in float32 whatever the file's type is."""
    return len(info.shape) > 1 and ".ffn_gate_inp." not in info.name


def _dtype(matrix_kinds: Iterable[GGMLQuantizationType]) -> str:
    """The type that all matrices have; bfloat16 if they are mixed or quantized, which was the coarser rounding."""
    kinds = set(matrix_kinds)
    only = kinds.pop() if len(kinds) == 1 else None
    return str(_TORCH_DTYPES.get(only, torch.bfloat16)).removeprefix("torch.")


def _undo_row_permutation(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Bytes of a query or key projection (or its bias), from llama.cpp's pairs to Hugging Face's halves."""
    pairs = rows.reshape(num_heads, len(rows) // num_heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """EOS (with end of turn and end of message), BOS and padding ids, as generation_config.json has them."""
    result: dict[str, Any] = {}
    stops = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    stop_ids = list(dict.fromkeys(stop for stop in stops if stop is not None))
    if stop_ids:
        result["eos_token_id"] = stop_ids[0] if len(stop_ids) == 1 else stop_ids
    for ours, theirs in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        if (token_id := metadata.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            result[ours] = token_id
    return result
