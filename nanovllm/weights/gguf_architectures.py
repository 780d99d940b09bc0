"""The GGUF architectures that are read: one row each, with names, config and what conversion did to the tensors.

Owns the meaning of their metadata and tensor names, in Hugging Face's terms. Does not own the container
(`model_files/gguf_file.py`), nor the numbers (`gguf.py`, `gguf_blocks.py`). Invariant: what is not understood is
refused by name, metadata and tensors alike; nothing that changes the mathematics is skipped.

Defaults of missing keys are llama.cpp's, since its files leave out what its code knows.
"""

import math
from collections.abc import Mapping

import torch

from nanovllm.model_files.gguf_file import GGUFFile
from nanovllm.weights.gguf_blocks import dequantize
from nanovllm.weights.gguf_dense import DENSE
from nanovllm.weights.gguf_gemma4 import GEMMA4
from nanovllm.weights.gguf_kimi import KIMI
from nanovllm.weights.gguf_metadata import GGUFMetadata
from nanovllm.weights.gguf_mixtures import MIXTURES, mixture_row
from nanovllm.weights.gguf_row import (
    NORMS_AFTER,
    ROPE_FREQS,
    Fields,
    GGUFArchitecture,
    layer_types,
    partial_rotary_factor,
)
from nanovllm.weights.gguf_states import STATES

ROPE_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")  # longrope's, likewise

# llama.cpp writes only the divisors of Llama 3's scaling; these constants of its formula are the same in every release.
_LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

_GEMMA_NAMES = {**NORMS_AFTER, "ffn_norm": "pre_feedforward_layernorm"}
_PHI3_NAMES = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}


# --- what some have beside the others ----------------------------------------------


def _qwen3_vl(metadata: GGUFMetadata, common: Fields) -> Fields:
    """The text model: for text, the sections of a rotation are the same, and nothing is added to the first layers."""
    metadata.ignore("rope.dimension_sections", "n_deepstack_layers")
    return {}


def _gemma2(metadata: GGUFMetadata, common: Fields) -> Fields:
    return {
        **_gemma(metadata, common, size_of_27b=46),
        "sliding_window": metadata.integer("attention.sliding_window", 4096),
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": metadata.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 30.0),
    }


def _gemma3(metadata: GGUFMetadata, common: Fields) -> Fields:
    """Files before mid 2025 hold no pattern: every sixth layer sees all."""
    window = metadata.integer("attention.sliding_window", 0) or None
    types = layer_types(metadata, common, period=6)
    theta, local_theta = common["rope_theta"], metadata.number("rope.freq_base_swa", 10000.0)
    return {
        **_gemma(metadata, common, size_of_27b=62),
        "sliding_window": window,
        "layer_types": types if window is not None else ["full_attention"] * len(types),
        "rope_parameters": {
            "full_attention": {"rope_type": "default", **(common["rope_scaling"] or {}), "rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
        },
        "rope_theta": None,
        "rope_scaling": None,
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 0.0) or None,
    }


def _gemma(metadata: GGUFMetadata, common: Fields, size_of_27b: int) -> Fields:
    """The 27B is the one size whose queries are not scaled by the head dimension; no metadata say so."""
    is_27b = common["num_hidden_layers"] == size_of_27b
    width = common["hidden_size"] // common["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": None,
        "query_pre_attn_scalar": width if is_27b else common["head_dim"],
    }


def _phi3(metadata: GGUFMetadata, common: Fields) -> Fields:
    """Its config.json has longrope's original length outside, and one value for models without it."""
    length = common["max_position_embeddings"]
    return {
        "sliding_window": metadata.integer("attention.sliding_window", 0) or None,
        "original_max_position_embeddings": metadata.integer("rope.scaling.original_context_length", length),
        "partial_rotary_factor": partial_rotary_factor(metadata, common),
    }


ARCHITECTURES: Mapping[str, GGUFArchitecture] = {
    "llama": GGUFArchitecture(hf_class="LlamaForCausalLM", model_type="llama", has_pairs=True),
    "qwen2": GGUFArchitecture(hf_class="Qwen2ForCausalLM", model_type="qwen2"),
    "qwen3": GGUFArchitecture(hf_class="Qwen3ForCausalLM", model_type="qwen3"),
    "qwen3vl": GGUFArchitecture(hf_class="Qwen3ForCausalLM", model_type="qwen3", fields=_qwen3_vl),
    "gemma2": GGUFArchitecture(
        hf_class="Gemma2ForCausalLM", model_type="gemma2", names=_GEMMA_NAMES, fields=_gemma2, norm_offset=1.0
    ),
    "gemma3": GGUFArchitecture(
        hf_class="Gemma3ForCausalLM", model_type="gemma3_text", names=_GEMMA_NAMES, fields=_gemma3, norm_offset=1.0
    ),
    "phi3": GGUFArchitecture(
        hf_class="Phi3ForCausalLM", model_type="phi3", names=_PHI3_NAMES, fields=_phi3, has_partial_rotary=True
    ),
    "smollm3": GGUFArchitecture(
        hf_class="SmolLM3ForCausalLM",
        model_type="smollm3",
        fields=lambda metadata, common: {"no_rope_layer_interval": 4},  # fixed in llama.cpp
        has_pairs=True,
    ),
    **DENSE,
    **MIXTURES,
    **STATES,
    **KIMI,
    **GEMMA4,
}


def read_architecture(file: GGUFFile) -> tuple[GGUFArchitecture, Fields]:
    """The row of a file's architecture, and its config.json. Raises ValueError or NotImplementedError by name."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise NotImplementedError(
            f"{file.path}: GGUF architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if file.metadata.get("general.type", "model") != "model":
        raise NotImplementedError(f"{file.path} holds a {file.metadata['general.type']!r}, not a model")
    metadata = GGUFMetadata(file, name)
    row = mixture_row(metadata) or ARCHITECTURES[name]
    common = _common_fields(metadata, row)
    config = {**common, **row.fields(metadata, common)}
    metadata.refuse_unread()
    return row, config


def _common_fields(metadata: GGUFMetadata, row: GGUFArchitecture) -> Fields:
    tensors = metadata.file.tensors
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{metadata.file.path} has no tensor token_embd.weight")
    num_heads, hidden_size = metadata.integer("attention.head_count"), metadata.integer("embedding_length")
    if not num_heads or (hidden_size % num_heads and not metadata.has("attention.key_length")):
        raise ValueError(
            f"{metadata.file.path}: {metadata.prefix}.embedding_length {hidden_size} is no multiple of "
            f"attention.head_count {num_heads}"
        )
    head_dim = metadata.integer("attention.key_length", hidden_size // num_heads)
    if row.model_type != "phi3" and any(name in tensors for name in ROPE_FACTORS):
        raise NotImplementedError(f"{metadata.file.path}: {ROPE_FACTORS[1]} is not supported for {metadata.prefix}")
    if not row.has_latents:
        metadata.expect("attention.value_length", head_dim)
    if not row.has_partial_rotary:
        metadata.expect("rope.dimension_count", head_dim)
    theta = metadata.number("rope.freq_base", 10000.0)
    return {
        "architectures": [row.hf_class],
        "model_type": row.model_type,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": _one_count(metadata, row, "feed_forward_length", _width_of_experts(metadata)),
        "num_hidden_layers": metadata.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _one_count(metadata, row, "attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": metadata.integer("context_length"),
        **_epsilon(metadata, row),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(metadata, theta, head_dim),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": any(f"blk.0.{name}.bias" in tensors for name in ("attn_q", "attn_qkv")),
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }


def _width_of_experts(metadata: GGUFMetadata) -> int | None:
    """Where no layer has another MLP, files may not say how wide one is."""
    return None if metadata.has("feed_forward_length") else metadata.integer("expert_feed_forward_length", 0) or None


def _one_count(metadata: GGUFMetadata, row: GGUFArchitecture, key: str, default: int | None = None) -> int:
    """Layers that keep states may have 0 where the others all have the same."""
    by_layer = metadata.by_layer(key)
    if row.layers_differ and isinstance(by_layer, list) and by_layer:
        return int(by_layer[0])
    if not row.has_states or not isinstance(by_layer, list):
        return metadata.integer(key, default)
    counts = {count for count in by_layer if count}
    if len(counts) != 1:
        raise NotImplementedError(f"{metadata.file.path}: {key} {by_layer} differs between layers")
    return int(counts.pop())


def _epsilon(metadata: GGUFMetadata, row: GGUFArchitecture) -> Fields:
    if row.layer_norm_eps is not None:
        return {row.layer_norm_eps: metadata.number("attention.layer_norm_epsilon")}
    key = "attention.layer_norm_rms_epsilon"
    if row.model_type == "nemotron_h" and not metadata.has(key):
        key = "attention.layer_norm_epsilon"
    return {"rms_norm_eps": metadata.number(key)}


# --- rotation ----------------------------------------------------------------------


def _rope_scaling(metadata: GGUFMetadata, theta: float, head_dim: int) -> Fields | None:
    tensors = metadata.file.tensors
    kind = metadata.text("rope.scaling.type", "none")
    factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 1.0))
    if any(name in tensors for name in ROPE_FACTORS):
        return _longrope_scaling(metadata, kind)
    if ROPE_FREQS in tensors and metadata.prefix != "gemma4":
        if kind != "none":
            raise NotImplementedError(f"{metadata.file.path} has both {ROPE_FREQS} and rope.scaling.type {kind!r}")
        return _llama3_scaling(metadata, theta, head_dim)
    original = metadata.by_layer("rope.scaling.original_context_length")
    if kind == "none" and factor in (0.0, 1.0):
        return None
    if kind in ("none", "linear"):  # files older than rope.scaling.type have a factor only
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise NotImplementedError(
            f"{metadata.file.path}: rope.scaling.type {kind!r} is not supported (none, linear, yarn are)"
        )
    if original is None:
        raise ValueError(
            f"{metadata.file.path}: metadata {metadata.prefix}.rope.scaling.original_context_length is missing"
        )
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    metadata.expect("rope.scaling.yarn_ext_factor", 1.0)
    own = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0  # llama.cpp takes this one, whatever the file says
    if not math.isclose(metadata.number("rope.scaling.yarn_attn_factor", own), own, rel_tol=1e-3):
        metadata.expect("rope.scaling.yarn_attn_factor", 1.0)
    for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        if (beta := metadata.number(f"rope.scaling.yarn_{name}", default)) != default:
            scaling[name] = beta
    return scaling


def _longrope_scaling(metadata: GGUFMetadata, kind: str) -> Fields:
    if kind not in ("none", "longrope"):
        raise NotImplementedError(f"{metadata.file.path} has {ROPE_FACTORS[1]} and rope.scaling.type {kind!r}")
    scaling: Fields = {"rope_type": "longrope"}
    for name, key in zip(ROPE_FACTORS, ("short_factor", "long_factor"), strict=True):
        if name not in metadata.file.tensors:
            raise ValueError(f"{metadata.file.path} has no tensor {name} beside the other of its kind")
        info = metadata.file.tensors[name]
        scaling[key] = dequantize(metadata.file.read_rows(info), info).flatten().tolist()
    if metadata.has("rope.scaling.attn_factor"):
        scaling["attention_factor"] = metadata.number("rope.scaling.attn_factor")
    return scaling


def _llama3_scaling(metadata: GGUFMetadata, theta: float, head_dim: int) -> Fields | None:
    """Find the Llama 3 scaling whose divisors are those in the file, or refuse them."""
    info = metadata.file.tensors[ROPE_FREQS]
    divisors = dequantize(metadata.file.read_rows(info), info).flatten().double()
    scaling = {"rope_type": "llama3", "factor": divisors.max().item(), **_LLAMA3_CONSTANTS}
    expected = llama3_divisors(theta, head_dim, scaling)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
        raise NotImplementedError(
            f"{metadata.file.path}: {ROPE_FREQS} is not Llama 3's scaling, the only one supported"
        )
    return None if scaling["factor"] == 1.0 else scaling


def llama3_divisors(theta: float, head_dim: int, scaling: Fields) -> torch.Tensor:
    """What Llama 3's scaling divides each rotary frequency by. Returns float64 [head_dim / 2].

    Wavelengths beyond original length / low_freq_factor are divided by `factor`, those below original length /
    high_freq_factor by 1, and those between by an interpolation (Llama 3.1 reference code, `apply_scaling`).
    """
    wavelengths = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    smooth = smooth.clamp(0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)
