"""From a Hugging Face config.json to ModelConfig.

Owns what the fields of a config.json mean, in the spelling of transformers 5 (`rope_parameters`, `layer_types`) and in
those before it; RoPE's are in `hf_rope.py`, types and bounds of single fields in `hf_fields.py`. Invariant: each field
is read, known to change nothing, or refused by name; none that could change the result is skipped.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from nanovllm.cache_specs import StateShape
from nanovllm.model_config import ModelConfig
from nanovllm.models.hf_fields import MAX_LAYERS, MAX_SIZE, flag, integer, items, number
from nanovllm.models.hf_rope import LAYER_TYPES, read_ropes

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# Read for every architecture; what else an architecture has is in its row of `registry.py`.
_COMMON = {
    *_SIZES,
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "tie_word_embeddings"),
    *("max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta", "quantization_config"),
}

# Fields that say something about training, storage or text generation, and nothing about the logits.
_WITHOUT_EFFECT = frozenset(
    "_attn_implementation _attn_implementation_autoset _commit_hash _model_name_or_path _name_or_path unk_token_id "
    "_sliding_window_pattern "
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
    "tie_encoder_decoder attn_pdrop gradient_checkpointing max_sequence_length model_max_length neftune_noise_alpha "
    "seq_length tie_last_hidden_states use_flash_attn".split()
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
    "num_nextn_predict_layers": 0,
    "moe_layer_freq": 1,
    "moe_use_aux_free": True,
    "use_bias": False,  # of ERNIE's mixtures, whose head would have one, too
    "shared_expert_intermediate_size": 0,
    "use_bidirectional_attention": False,
    "use_mrope": False,
}

_ACTIVATIONS: Mapping[str, str] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

# Fields that state what the architecture does anyway, beside what the ModelConfig says it does.
_STATEMENTS: Mapping[str, Callable[[ModelConfig], Any]] = {
    "qkv_bias": lambda config: config.qkv_bias,
    "attention_out_bias": lambda config: config.o_bias,
    "use_qk_norm": lambda config: config.qk_norm is not None,
    "qk_norm": lambda config: config.qk_norm is not None,
    "use_sliding_window": lambda config: any(window is not None for window in config.windows),
}


def from_hf(
    hf: Mapping[str, Any],
    *,
    dtype: str,
    fields: Mapping[str, Any],
    switches: Mapping[str, Any],
    rope: Callable[..., Mapping[str, Any] | None] | None = None,
    states: Mapping[str, Callable[[Mapping[str, Any]], StateShape]] | None = None,
) -> ModelConfig:
    """Read a config.json dict. dtype is resolved already.

    fields: the fields that the architecture has beside those of all decoders, with the values they have when they are
    missing; it may also hold other defaults for common fields. switches: ModelConfig fields that the architecture sets.
    rope, states: see `Architecture`.
    Raises ValueError for a missing field, and for one that changes the result in a way that is not implemented.
    """
    architecture = hf["architectures"][0]
    given = hf
    hf = {**fields, **hf}
    num_heads = integer(hf, "num_attention_heads")
    num_kv_heads = num_heads if hf.get("num_key_value_heads") is None else integer(hf, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_attention_heads {num_heads} must be a multiple of num_key_value_heads {num_kv_heads}")
    hidden_size = integer(hf, "hidden_size")
    if hf.get("head_dim") is None and hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} must be a multiple of num_attention_heads {num_heads}")
    head_dim = hidden_size // num_heads if hf.get("head_dim") is None else integer(hf, "head_dim")
    if num_heads * head_dim > MAX_SIZE:
        raise ValueError(f"num_attention_heads {num_heads} times head_dim {head_dim} is more than {MAX_SIZE}")
    has_length = hf.get("max_position_embeddings") is not None
    max_position_embeddings = integer(hf, "max_position_embeddings") if has_length else 2048
    integer(hf, "num_hidden_layers", high=MAX_LAYERS)
    states = states or {}
    layer_types = _read_layer_types(hf, states)
    ropes = read_ropes(hf, layer_types, _read_has_rope(hf), max_position_embeddings, head_dim, rope)
    attention_bias = flag(hf, "attention_bias")
    read = {
        "architecture": architecture,
        "dtype": dtype,
        "vocab_size": integer(hf, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": integer(hf, "intermediate_size"),
        "num_layers": hf["num_hidden_layers"],
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-6 if hf.get("rms_norm_eps") is None else number(hf, "rms_norm_eps", at_least=0.0),
        "max_model_len": min(
            (rope.max_positions(max_position_embeddings) for rope in ropes if rope is not None),
            default=max_position_embeddings,
        ),
        "tie_word_embeddings": flag(hf, "tie_word_embeddings"),
        "windows": _read_windows(hf, layer_types, states),
        "state": next((states[layer_type](hf) for layer_type in layer_types if layer_type in states), None),
        "ropes": ropes,
        "attention_scale": _read_attention_scale(hf, head_dim),
        "qkv_bias": attention_bias,
        "o_bias": attention_bias,
        "mlp_bias": flag(hf, "mlp_bias"),
        "activation": switches["activation"] if "activation" in switches else read_activation(hf),
        "attention_softcap": _read_number(hf, "attn_logit_softcapping"),
        "logits_softcap": _read_number(hf, "final_logit_softcapping"),
        "embedding_scale": _read_number(hf, "embedding_multiplier") or 1.0,
        "residual_scale": _read_number(hf, "residual_multiplier") or 1.0,
        "logits_scale": 1.0 / (_read_number(hf, "logits_scaling") or 1.0),
        "extra": {name: hf[name] for name in fields},
        "quantization": _read_quantization(hf),
    }
    set_by_architecture = {name: value(hf) if callable(value) else value for name, value in switches.items()}
    config = ModelConfig(**{**read, **set_by_architecture})
    _refuse_unknown_fields(config, given, fields)
    return config


def read_eos_token_ids(hf: Mapping[str, Any], vocab_size: int) -> list[int]:
    """`eos_token_id` of a config.json or generation_config.json: an id of the vocabulary, several, or none."""
    given = hf.get("eos_token_id")
    ids = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise ValueError(f"eos_token_id {given!r} of the model is not in its vocabulary of {vocab_size} tokens")
    return list(ids)


def _refuse_unknown_fields(config: ModelConfig, hf: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    for name, value in hf.items():
        if value is None or name in fields or name in _COMMON or name in _WITHOUT_EFFECT:
            continue
        if name in _STATEMENTS and value == _STATEMENTS[name](config):
            continue
        if name not in _NEUTRAL or value != _NEUTRAL[name]:
            only = f"; only {_NEUTRAL[name]!r} is" if name in _NEUTRAL else ", so the model would be run wrongly"
            raise ValueError(f"config.json of {config.architecture}: {name}={value!r} is not supported{only}")


def _read_quantization(hf: Mapping[str, Any]) -> Mapping[str, Any] | None:
    given = hf.get("quantization_config")
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"config.json: quantization_config must be an object, got {given!r}")
    return given or None


def _read_number(hf: Mapping[str, Any], name: str) -> float | None:
    return None if hf.get(name) is None else number(hf, name)


def _read_attention_scale(hf: Mapping[str, Any], head_dim: int) -> float:
    multiplier = _read_number(hf, "attention_multiplier")
    scalar = _read_number(hf, "query_pre_attn_scalar")
    return multiplier if multiplier is not None else (scalar or head_dim) ** -0.5


def read_activation(hf: Mapping[str, Any], supported: Mapping[str, str] = _ACTIVATIONS) -> str:
    """This project's name of an activation that is among `supported`, by config.json's names."""
    field = "hidden_activation" if "hidden_activation" in hf else "hidden_act"
    name = hf.get(field) or "silu"
    if not isinstance(name, str) or name not in supported:
        raise ValueError(f"config.json: {field}={name!r} is not supported; supported are {', '.join(supported)}")
    return supported[name]


# --- layers that differ ------------------------------------------------------------


def _read_layer_types(hf: Mapping[str, Any], states: Collection[str]) -> Sequence[str]:
    """`layer_types`, or what the older switches of an architecture make of them."""
    num_layers = hf["num_hidden_layers"]
    if hf.get("layer_types") is not None:
        known = (
            *LAYER_TYPES,
            *states,
            "attention",
        )  # the last as hybrid models called full attention before transformers 5
        given = items(hf, "layer_types", known.__contains__, f"supported layer types ({', '.join(known)})")
        if len(given) != num_layers:
            raise ValueError(f"config.json has {len(given)} layer_types for {num_layers} layers")
        if all(layer_type in states for layer_type in given):
            raise NotImplementedError("config.json: models without an attention layer are not supported yet")
        return ["full_attention" if layer_type == "attention" else layer_type for layer_type in given]
    is_full = [False] * num_layers
    if hf.get("sliding_window_pattern") is not None:  # Gemma: every so many layers, one sees all
        pattern = integer(hf, "sliding_window_pattern")
        is_full = [(layer + 1) % pattern == 0 for layer in range(num_layers)]
    elif "no_rope_layer_interval" in hf:  # SmolLM3
        is_full = list(_read_has_rope(hf))
    elif flag(hf, "use_sliding_window"):  # Qwen
        is_given = hf.get("max_window_layers") is not None
        first = integer(hf, "max_window_layers", low=0) if is_given else num_layers
        is_full = [layer < first for layer in range(num_layers)]
    return ["full_attention" if full else "sliding_attention" for full in is_full]


def _read_windows(hf: Mapping[str, Any], layer_types: Sequence[str], states: Collection[str]) -> tuple[int | None, ...]:
    has_window = hf.get("sliding_window") is not None and hf.get("use_sliding_window") is not False
    window = integer(hf, "sliding_window") if has_window else None
    by_type = {"sliding_attention": window, **dict.fromkeys(states, 0)}
    return tuple(map(by_type.get, layer_types))


def _read_has_rope(hf: Mapping[str, Any]) -> Sequence[bool]:
    num_layers = hf["num_hidden_layers"]
    if hf.get("no_rope_layers") is not None:  # 1 for a layer that has it, in spite of the name
        given = items(hf, "no_rope_layers", (0, 1).__contains__, "zeros and ones")
        if len(given) < num_layers:
            raise ValueError(f"config.json has {len(given)} no_rope_layers for {num_layers} layers")
        return [bool(has_rope) for has_rope in given[:num_layers]]
    if hf.get("no_rope_layer_interval") is None:
        return [True] * num_layers
    interval = integer(hf, "no_rope_layer_interval")
    return [(layer + 1) % interval != 0 for layer in range(num_layers)]
