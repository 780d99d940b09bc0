"""From a Hugging Face config.json to ModelConfig.

Owns what the fields of a config.json mean, in the spelling of transformers 5 (`rope_parameters`, `layer_types`) and in
those before it. Invariant: each field is read, known to change nothing, or refused by name; none that could change the
result is skipped.
"""

import warnings
from collections.abc import Mapping, Sequence
from math import log, sqrt
from typing import Any

from nanovllm.config import ModelConfig, RopeConfig

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# Read for every architecture; what else an architecture has is in its row of `registry.py`.
_COMMON = {
    *_SIZES,
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "tie_word_embeddings"),
    *("max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta"),
}

# Fields that say something about training, storage or text generation, and nothing about the logits.
_WITHOUT_EFFECT = frozenset(
    "_attn_implementation _attn_implementation_autoset _commit_hash _name_or_path _sliding_window_pattern "
    "architectures attention_dropout attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id "
    "cache_implementation decoder_start_token_id dtype embd_pdrop eos_token_id exponential_decay_length_penalty "
    "finetuning_task forced_bos_token_id forced_eos_token_id hidden_dropout_prob id2label initializer_range "
    "is_llama_config keys_to_ignore_at_inference label2id max_window_layers model_type name_or_path num_labels "
    "output_attentions output_hidden_states output_router_logits router_aux_loss_coef router_jitter_noise "
    "pad_token_id prefix pretraining_tp problem_type resid_pdrop return_dict return_dict_in_generate sep_token_id "
    "sliding_window_pattern suppress_tokens task_specific_params tf_legacy_loss tokenizer_class torch_dtype "
    "torchscript transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache "
    "chunk_size_feed_forward do_sample temperature top_k top_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size num_beams num_beam_groups num_return_sequences "
    "diversity_penalty early_stopping max_length min_length output_scores remove_invalid_values pruned_heads "
    "tie_encoder_decoder".split()
)

# Fields that change the result, except at this value.
_NEUTRAL: Mapping[str, Any] = {
    "add_cross_attention": False,
    "attention_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "lm_head_bias": False,
    "logits_scaling": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "use_bidirectional_attention": False,
    "use_mrope": False,
    "use_sliding_window": False,
}

_ACTIVATIONS: Mapping[str, str] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

_ROPE_NUMBERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
    "longrope": (),
}
_ROPE_PARAMETERS = {
    *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "attention_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "short_factor", "long_factor"),
}
_DEFAULT_THETA = 10000.0
_LAYER_TYPES = ("full_attention", "sliding_attention")


def from_hf(
    hf: Mapping[str, Any], *, dtype: str, fields: Mapping[str, Any], switches: Mapping[str, Any]
) -> ModelConfig:
    """Read a config.json dict. dtype is resolved already.

    fields: the fields that the architecture has beside those of all decoders, with the values they have when they are
    missing; it may also hold other defaults for common fields. switches: ModelConfig fields that the architecture sets.
    Raises ValueError for a missing field, and for one that changes the result in a way that is not implemented.
    """
    architecture = hf["architectures"][0]
    _refuse_unknown_fields(architecture, hf, fields)
    hf = {**fields, **hf}
    for name in _SIZES:
        if not isinstance(hf.get(name), int):
            raise ValueError(f"config.json of {architecture}: {name} must be an integer, got {hf.get(name)!r}")
    num_heads = hf["num_attention_heads"]
    num_kv_heads = hf.get("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise ValueError(f"num_attention_heads {num_heads} must be a multiple of num_key_value_heads {num_kv_heads}")
    head_dim = hf.get("head_dim") or hf["hidden_size"] // num_heads
    max_position_embeddings = hf.get("max_position_embeddings") or 2048
    layer_types = _read_layer_types(hf)
    ropes = _read_ropes(hf, layer_types, max_position_embeddings, head_dim)
    attention_bias = bool(hf.get("attention_bias", False))
    read = {
        "architecture": architecture,
        "dtype": dtype,
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": hf.get("rms_norm_eps") or 1e-6,
        "max_model_len": min(
            (rope.max_positions(max_position_embeddings) for rope in ropes if rope is not None),
            default=max_position_embeddings,
        ),
        "tie_word_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "windows": _read_windows(hf, layer_types),
        "ropes": ropes,
        "attention_scale": _read_attention_scale(hf, head_dim),
        "qkv_bias": attention_bias,
        "o_bias": attention_bias,
        "mlp_bias": bool(hf.get("mlp_bias", False)),
        "activation": switches["activation"] if "activation" in switches else _read_activation(hf),
        "attention_softcap": _read_number(hf, "attn_logit_softcapping"),
        "logits_softcap": _read_number(hf, "final_logit_softcapping"),
        "embedding_scale": _read_number(hf, "embedding_multiplier") or 1.0,
        "residual_scale": _read_number(hf, "residual_multiplier") or 1.0,
        "logits_scale": 1.0 / (_read_number(hf, "logits_scaling") or 1.0),
        "extra": {name: hf[name] for name in fields},
    }
    set_by_architecture = {name: value(hf) if callable(value) else value for name, value in switches.items()}
    return ModelConfig(**{**read, **set_by_architecture})


def _refuse_unknown_fields(architecture: str, hf: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    for name, value in hf.items():
        if value is None or name in fields or name in _COMMON or name in _WITHOUT_EFFECT:
            continue
        if name not in _NEUTRAL or value != _NEUTRAL[name]:
            only = f"; only {_NEUTRAL[name]!r} is" if name in _NEUTRAL else ", so the model would be run wrongly"
            raise ValueError(f"config.json of {architecture}: {name}={value!r} is not supported{only}")


def _read_number(hf: Mapping[str, Any], name: str) -> float | None:
    value = hf.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ValueError(f"config.json: {name} must be a positive number, got {value!r}")
    return float(value)


def _read_attention_scale(hf: Mapping[str, Any], head_dim: int) -> float:
    multiplier = _read_number(hf, "attention_multiplier")
    scalar = _read_number(hf, "query_pre_attn_scalar")
    return multiplier if multiplier is not None else (scalar or head_dim) ** -0.5


def _read_activation(hf: Mapping[str, Any]) -> str:
    field = "hidden_activation" if "hidden_activation" in hf else "hidden_act"
    name = hf.get(field) or "silu"
    if name not in _ACTIVATIONS:
        raise ValueError(f"config.json: {field}={name!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


# --- layers that differ ------------------------------------------------------------


def _read_layer_types(hf: Mapping[str, Any]) -> Sequence[str]:
    """`layer_types`, or what the older switches of an architecture make of them."""
    num_layers, given = hf["num_hidden_layers"], hf.get("layer_types")
    if given is not None:
        if len(given) != num_layers:
            raise ValueError(f"config.json has {len(given)} layer_types for {num_layers} layers")
        for layer_type in given:
            if layer_type not in _LAYER_TYPES:
                raise ValueError(f"layer type {layer_type!r} is not supported; supported are {', '.join(_LAYER_TYPES)}")
        return list(given)
    is_full = [False] * num_layers
    if hf.get("sliding_window_pattern"):  # Gemma: every so many layers, one sees all
        is_full = [(layer + 1) % hf["sliding_window_pattern"] == 0 for layer in range(num_layers)]
    elif "no_rope_layer_interval" in hf:  # SmolLM3
        is_full = [bool(has_rope) for has_rope in _read_has_rope(hf)]
    elif hf.get("use_sliding_window"):  # Qwen
        is_full = [layer < hf.get("max_window_layers", num_layers) for layer in range(num_layers)]
    return ["full_attention" if full else "sliding_attention" for full in is_full]


def _read_windows(hf: Mapping[str, Any], layer_types: Sequence[str]) -> tuple[int | None, ...]:
    window = None if hf.get("use_sliding_window") is False else hf.get("sliding_window")
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)


def _read_has_rope(hf: Mapping[str, Any]) -> Sequence[bool]:
    num_layers, given = hf["num_hidden_layers"], hf.get("no_rope_layers")
    if given is not None:  # 1 for a layer that has it, in spite of the name
        if len(given) < num_layers:
            raise ValueError(f"config.json has {len(given)} no_rope_layers for {num_layers} layers")
        return [bool(flag) for flag in given[:num_layers]]
    interval = hf.get("no_rope_layer_interval")
    return [interval is None or (layer + 1) % interval != 0 for layer in range(num_layers)]


def _read_ropes(
    hf: Mapping[str, Any], layer_types: Sequence[str], max_position_embeddings: int, head_dim: int
) -> tuple[RopeConfig | None, ...]:
    """RoPE from `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling` (before), or both.

    A `rope_scaling` beside `rope_parameters` was added by hand, and wins as in transformers: it takes the whole place
    of the other, or with one rotation a layer type, is laid over that of the layers that see all.
    """
    saved, added = dict(hf.get("rope_parameters") or {}), dict(hf.get("rope_scaling") or {})
    if "rope_local_base_freq" in hf:  # the layers with a window have a base of their own, and are never stretched
        if not any(layer_type in saved for layer_type in _LAYER_TYPES):
            saved = {"full_attention": saved}
        local = {"rope_theta": hf["rope_local_base_freq"]}
        by_type = {
            "full_attention": {**(saved.get("full_attention") or {}), **added},
            "sliding_attention": {**local, **(saved.get("sliding_attention") or {})},
        }
    else:
        by_type = dict.fromkeys(_LAYER_TYPES, added or saved)
        lost = saved.get("rope_theta") if added else None
        if lost is not None and lost != (added.get("rope_theta") or hf.get("rope_theta") or _DEFAULT_THETA):
            warnings.warn(
                f"config.json: rope_scaling takes the place of rope_parameters, as in transformers, and with it of "
                f"rope_theta={lost}; repeat rope_theta in rope_scaling if the model was trained with it",
                stacklevel=2,
            )
    ropes = {
        layer_type: _read_rope(hf, by_type[layer_type], max_position_embeddings, head_dim)
        for layer_type in set(layer_types)
    }
    has_rope = _read_has_rope(hf)
    return tuple(ropes[layer_type] if has else None for layer_type, has in zip(layer_types, has_rope, strict=True))


def _read_rope(
    hf: Mapping[str, Any], given: Mapping[str, Any], max_position_embeddings: int, head_dim: int
) -> RopeConfig:
    parameters = {name: value for name, value in given.items() if value is not None}
    rope_type = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    theta = parameters.pop("rope_theta", None) or hf.get("rope_theta") or _DEFAULT_THETA
    share = parameters.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or 1.0
    if rope_type in ("su", "yarn") and "short_factor" in parameters:
        rope_type = "longrope"  # what Phi-3's first configs called it
    if rope_type not in _ROPE_NUMBERS:
        raise ValueError(f"rope type {rope_type!r} is not supported; supported are {', '.join(_ROPE_NUMBERS)}")
    if share != 1.0 and "partial_rotary_factor" not in hf:
        raise ValueError(f"partial_rotary_factor={share} is not supported for this architecture; only 1.0 is")
    for name in _ROPE_NUMBERS[rope_type]:
        if not isinstance(parameters.get(name), (int, float)):
            raise ValueError(f"rope type {rope_type!r} needs a number {name!r} in rope_parameters, got {parameters}")
    for name in parameters:
        if name not in _ROPE_PARAMETERS:
            raise ValueError(f"{name!r} in rope_parameters is not understood, so the model would be run wrongly")
    if rope_type == "default":
        parameters = {}
    original = parameters.get("original_max_position_embeddings")
    if rope_type == "dynamic" or (rope_type == "yarn" and original is None):  # dynamic never looks at it, as in HF
        parameters["original_max_position_embeddings"] = max_position_embeddings
    if rope_type == "longrope":
        parameters = _read_longrope(hf, parameters, max_position_embeddings, int(head_dim * share))
    return RopeConfig(rope_type=rope_type, theta=float(theta), share=float(share), parameters=parameters)


def _read_longrope(
    hf: Mapping[str, Any], parameters: Mapping[str, Any], max_position_embeddings: int, rotary_dim: int
) -> dict[str, Any]:
    for name in ("short_factor", "long_factor"):
        factors = parameters.get(name)
        if not isinstance(factors, list) or len(factors) != rotary_dim // 2:
            raise ValueError(f"rope type 'longrope' needs {name!r}, a list of {rotary_dim // 2} numbers, got {factors}")
    original = hf.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
    original = original or max_position_embeddings
    factor = parameters.get("factor") or max_position_embeddings / original
    sharper = sqrt(1 + log(factor) / log(original)) if factor > 1 else 1.0
    return {
        "short_factor": parameters["short_factor"],
        "long_factor": parameters["long_factor"],
        "original_max_position_embeddings": original,
        "attention_factor": parameters.get("attention_factor", sharper),
    }
