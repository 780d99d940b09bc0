"""Which architectures run, and with which switches: one row each, read top to bottom.

Owns the table. Invariant: an architecture that is not in it is refused by name before any weight is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

from nanovllm.config import ModelConfig
from nanovllm.models.hf_config import from_hf

_DECODER = "nanovllm.models.llama:LlamaForCausalLM"
_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
_BIASES = {"attention_bias": False, "mlp_bias": False}
_GEMMA = {
    "attention_bias": False,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "layer_types": None,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA_SWITCHES = {"norms": "both", "norm_offset": 1.0, "embedding_scale": lambda hf: hf["hidden_size"] ** 0.5}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How a name in config.json's `architectures` is run.

    fields: config.json fields beside those of all decoders, with the values they have when missing (transformers'
        defaults); ModelConfig.extra hands them to the model. It may also hold other defaults for common fields.
    switches: ModelConfig fields that the architecture sets; a function gets the config.json dict, defaults filled in.
    model: "module:class", called with (config, max_len, dtype, tp, ops).
    mlp: "module:class" of another feed-forward block, called with (config, layer_idx, dtype, tp, ops).
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    switches: Mapping[str, Any] = field(default_factory=dict)
    model: str = _DECODER
    mlp: str | None = None


ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(fields=_BIASES),
    "MistralForCausalLM": Architecture(fields={"sliding_window": 4096}),
    "Qwen2ForCausalLM": Architecture(
        fields={**_QWEN_WINDOW, "attention_bias": True}, switches={"qkv_bias": True, "o_bias": False}
    ),
    "Qwen3ForCausalLM": Architecture(
        fields={**_QWEN_WINDOW, "attention_bias": False, "head_dim": 128}, switches={"qk_norm": "head"}
    ),
    "SmolLM3ForCausalLM": Architecture(
        fields={
            **_BIASES,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "rope_theta": 2000000.0,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        }
    ),
    "Gemma2ForCausalLM": Architecture(
        fields={
            **_GEMMA,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
        },
        switches=_GEMMA_SWITCHES,
    ),
    "Gemma3ForCausalLM": Architecture(
        fields={
            **_GEMMA,
            "final_logit_softcapping": None,
            "rope_local_base_freq": 10000.0,
            "rope_theta": 1000000.0,
            "sliding_window_pattern": 6,
        },
        switches={**_GEMMA_SWITCHES, "qk_norm": "head"},
    ),
    "Phi3ForCausalLM": Architecture(
        fields={
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 1.0,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        }
    ),
    "Olmo2ForCausalLM": Architecture(
        fields={"attention_bias": False, "rms_norm_eps": 1e-5}, switches={"norms": "after", "qk_norm": "projection"}
    ),
    "GraniteForCausalLM": Architecture(
        fields={
            **_BIASES,
            "attention_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
        }
    ),
    "Qwen3MoeForCausalLM": Architecture(
        fields={
            **{"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 0, "attention_bias": False},
            **{"num_experts": 128, "num_local_experts": None, "num_experts_per_tok": 8, "norm_topk_prob": False},
            **{"moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": None},
        },
        switches={"qk_norm": "head"},
        mlp="nanovllm.models.mixture:qwen3_moe",
    ),
    "MixtralForCausalLM": Architecture(
        fields={
            **{"sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2},
            **{"rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "num_key_value_heads": 8},
        },
        mlp="nanovllm.models.mixture:mixtral",
    ),
    "OlmoeForCausalLM": Architecture(
        fields={
            **{"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
            **{"rms_norm_eps": 1e-5, "attention_bias": False},
        },
        switches={"qk_norm": "projection"},
        mlp="nanovllm.models.mixture:olmoe",
    ),
}


def read_model_config(hf: Mapping[str, Any], dtype: str) -> ModelConfig:
    """ModelConfig of a config.json dict; ValueError names an architecture or field that is not supported."""
    row = _architecture(hf)
    return from_hf(hf, dtype=dtype, fields=row.fields, switches=row.switches)


def model_class(architecture: str) -> Any:
    """What makes the model of an architecture of the table: `cls(config, max_len, dtype, tp, ops)`."""
    row = ARCHITECTURES[architecture]
    model = _load(row.model)
    return model if row.mlp is None else partial(model, mlp=_load(row.mlp))


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def _architecture(hf: Mapping[str, Any]) -> Architecture:
    names = hf.get("architectures") or [None]
    if names[0] not in ARCHITECTURES:
        raise ValueError(f"architecture {names[0]!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[names[0]]
