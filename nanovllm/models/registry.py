"""Which architectures run, and with which switches: one row each, read top to bottom.

Owns the table, and what other packages add to it (`docs/adding-a-model.md`). Invariant: an architecture that is not in
it is refused by name before any weight is read.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from nanovllm.model_config import ModelConfig
from nanovllm.models.architecture import Architecture
from nanovllm.models.dense_families import DENSE_FAMILIES, GRANITE_MULTIPLIERS
from nanovllm.models.gemma4_family import GEMMA4
from nanovllm.models.hf_config import from_hf
from nanovllm.models.hf_fields import flag
from nanovllm.models.latent_families import LATENT_FAMILIES
from nanovllm.models.mamba_families import MAMBA_FAMILIES
from nanovllm.models.mixture_families import MIXTURE_FAMILIES
from nanovllm.models.state_families import STATE_FAMILIES

_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
_PROOF = "tests/models/test_hf_parity.py"
_WRAPPED_PROOF = "tests/models/test_wrapped_models.py"
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


_ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        serves="Llama 2 and 3, SmolLM2, and models of their shape", proof=_PROOF, fields=_BIASES
    ),
    "MistralForCausalLM": Architecture(
        serves="Mistral, with or without a sliding window", proof=_PROOF, fields={"sliding_window": 4096}
    ),
    "MinistralForCausalLM": Architecture(
        serves="Ministral 8B: windows in some layers",
        proof=_PROOF,
        fields={"sliding_window": 4096, "layer_types": None},
    ),
    "SeedOssForCausalLM": Architecture(
        serves="Seed-OSS",
        proof=_PROOF,
        fields={
            **{"attention_bias": True, "attention_out_bias": False, "mlp_bias": False, "residual_dropout": 0.0},
            **{"head_dim": 128, "num_key_value_heads": 8},
        },
        switches={"o_bias": lambda hf: flag(hf, "attention_out_bias")},
    ),
    "Qwen2ForCausalLM": Architecture(
        serves="Qwen2, Qwen2.5",
        proof=_PROOF,
        fields={**_QWEN_WINDOW, "attention_bias": True},
        switches={"qkv_bias": True, "o_bias": False},
    ),
    "Qwen3ForCausalLM": Architecture(
        serves="Qwen3",
        proof=_PROOF,
        fields={**_QWEN_WINDOW, "attention_bias": False, "head_dim": 128},
        switches={"qk_norm": "head"},
    ),
    "SmolLM3ForCausalLM": Architecture(
        serves="SmolLM3: layers without rotation",
        proof=_PROOF,
        fields={
            **_BIASES,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "rope_theta": 2000000.0,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        },
    ),
    "GemmaForCausalLM": Architecture(
        serves="Gemma 1",
        proof=_PROOF,
        fields={
            **{"attention_bias": False, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh"},
            **{"num_key_value_heads": 16, "tie_word_embeddings": True},
        },
        # Whatever the config says, as in transformers: the first releases meant the approximation by "gelu".
        switches={"norm_offset": 1.0, "activation": "gelu_tanh", "embedding_scale": _GEMMA_SWITCHES["embedding_scale"]},
    ),
    "Gemma2ForCausalLM": Architecture(
        serves="Gemma 2",
        proof=_PROOF,
        fields={
            **_GEMMA,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
        },
        switches=_GEMMA_SWITCHES,
    ),
    "Gemma3ForCausalLM": Architecture(
        serves="Gemma 3, text models",
        proof=_PROOF,
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
        serves="Phi-3, Phi-3.5, Phi-4",
        proof=_PROOF,
        fields={
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 1.0,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
    ),
    "Olmo2ForCausalLM": Architecture(
        serves="OLMo 2",
        proof=_PROOF,
        fields={"attention_bias": False, "rms_norm_eps": 1e-5},
        switches={"norms": "after", "qk_norm": "projection"},
    ),
    "GraniteForCausalLM": Architecture(
        serves="Granite 3",
        proof=_PROOF,
        fields={**_BIASES, **GRANITE_MULTIPLIERS},
    ),
    "Gemma4ForCausalLM": GEMMA4,
    **MIXTURE_FAMILIES,
    **DENSE_FAMILIES,
    **STATE_FAMILIES,
    **MAMBA_FAMILIES,
    **LATENT_FAMILIES,
}

# Multimodal checkpoints, of which the text model is run. Some leave out of its config what is transformers' default.
_WRAPPED = {
    "Gemma3ForConditionalGeneration": (
        "Gemma3ForCausalLM",
        "Gemma 3, 4B and up",
        {
            **{"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4},
            "max_position_embeddings": 131072,
        },
    ),
    "Gemma4ForConditionalGeneration": ("Gemma4ForCausalLM", "Gemma 4", {}),
    "Mistral3ForConditionalGeneration": ("MistralForCausalLM", "Mistral Small 3.1 and 3.2, Ministral 3", {}),
    "Qwen3VLForConditionalGeneration": ("Qwen3ForCausalLM", "Qwen3-VL", {}),
    "Qwen3_5ForConditionalGeneration": ("Qwen3_5ForCausalLM", "Qwen3.5 and 3.6", {}),
    "Qwen3_5MoeForConditionalGeneration": ("Qwen3_5MoeForCausalLM", "Qwen3.5 and 3.6, mixtures", {}),
}
# By the whole and the `model_type` of its text model, where the whole alone does not say which text model it holds.
_TEXT_MODELS = {"Mistral3ForConditionalGeneration, ministral3": "Ministral3ForCausalLM"}
ARCHITECTURES: Mapping[str, Architecture] = {
    **_ARCHITECTURES,
    **{
        name: replace(
            _ARCHITECTURES[of],
            serves=f"{serves}: the text model",
            proof=_WRAPPED_PROOF,
            fields={**_ARCHITECTURES[of].fields, **fields},
        )
        for name, (of, serves, fields) in _WRAPPED.items()
    },
}


# The one table of this package that a running program may add to; entry points need none.
_registered: dict[str, Architecture] = {}
ENTRY_POINTS = "nanovllm.models"


def register_model(name: str, architecture: Architecture) -> None:
    """Let `LLM` run checkpoints whose config.json has `name` in `architectures`, in this process.

    A package does better to name its Architecture in an entry point of the group "nanovllm.models": then every process
    finds it, also the workers of tensor parallelism. ValueError if another one of that name is there already.
    """
    if not isinstance(architecture, Architecture):
        raise TypeError(f"architecture of {name!r} must be a nanovllm.Architecture, got {architecture!r}")
    if name in ARCHITECTURES or _registered.get(name, architecture) != architecture:
        raise ValueError(f"a model {name!r} is registered already; choose another name")
    _registered[name] = architecture


def all_architectures() -> dict[str, Architecture]:
    """Every architecture by name: those of this package, registered ones, and those of installed packages."""
    found = {point.name: point.load() for point in entry_points(group=ENTRY_POINTS)}
    for name, architecture in found.items():
        if not isinstance(architecture, Architecture):
            raise TypeError(
                f"entry point {name!r} of {ENTRY_POINTS} must be a nanovllm.Architecture, got {architecture!r}"
            )
    return {**found, **_registered, **ARCHITECTURES}


def read_model_config(hf: Mapping[str, Any], dtype: str) -> ModelConfig:
    """ModelConfig of a config.json dict; ValueError names an architecture or field that is not supported."""
    given = hf.get("architectures") or [None]
    if not isinstance(given, (list, tuple)) or not isinstance(given[0], (str, type(None))):
        raise ValueError(f"config.json: architectures must be a list of names, got {given!r}")
    name = _TEXT_MODELS.get(f"{given[0]}, {hf.get('model_type')}", given[0])
    row, hf = _architecture(name), {**hf, "architectures": [name]}
    if row.translate is not None:
        hf = {**hf, **row.translate({**row.fields, **hf})}
    return from_hf(hf, dtype=dtype, fields=row.fields, switches=row.switches, rope=row.rope, states=row.states)


def model_class(architecture: str) -> Any:
    """What makes the model of an architecture: `cls(config, max_len, dtype, tp, ops)`."""
    row = _architecture(architecture)
    parts = {"norm": row.norm, "attention": row.attention, "mlp": row.mlp}
    others = {name: _load(made_by) for name, made_by in parts.items() if made_by is not None}
    return partial(_load(row.model), **others) if others else _load(row.model)


def _architecture(name: str | None) -> Architecture:
    if name is not None and name in ARCHITECTURES:
        return ARCHITECTURES[name]
    known = all_architectures()
    if name is None or name not in known:
        raise ValueError(
            f"architecture {name!r} is not supported; supported are {', '.join(known)}. How to add one: "
            "docs/adding-a-model.md"
        )
    return known[name]


def _load(made_by: str | Callable[..., Any]) -> Any:
    if not isinstance(made_by, str):
        return made_by
    module, _, attribute = made_by.partition(":")
    return getattr(import_module(module), attribute)
