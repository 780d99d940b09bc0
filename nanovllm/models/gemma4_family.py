"""What Gemma 4's config.json says of its layers: their heads, whose keys and values they read, their rotation.

Owns its row of the table in `registry.py`. Does not own the decoder (`gemma4.py`). Invariant: as in `registry.py`, a
row is plain data, and a default is transformers'.
"""

from collections.abc import Mapping
from typing import Any

from nanovllm.models.architecture import Architecture
from nanovllm.models.hf_fields import flag, integer, mapping

Fields = Mapping[str, Any]
_ROPES = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}


def _gemma4(hf: Fields) -> dict[str, Any]:
    """Five layers with a window to one that sees all, which the last one always does."""
    if hf["use_bidirectional_attention"] not in (None, False, "vision"):  # of images, there are none
        raise ValueError(
            f"config.json: use_bidirectional_attention={hf['use_bidirectional_attention']!r} is not supported; models "
            "that look ahead do not generate"
        )
    layers = range(1, integer(hf, "num_hidden_layers") + 1)
    types = list(hf["layer_types"] or ["sliding_attention" if layer % 6 else "full_attention" for layer in layers])
    types[-1:] = ["full_attention"]
    return {"layer_types": types, "rope_parameters": hf.get("rope_parameters") or _ROPES}


def _layer_heads(hf: Fields) -> tuple[tuple[int, int], ...]:
    """(KV heads, their size) of each layer: by `per_layer_config`, or by the fields that released checkpoints have."""
    own = {"num_key_value_heads": integer(hf, "num_key_value_heads"), "head_dim": integer(hf, "head_dim")}
    of_full = {"head_dim": integer(hf, "global_head_dim")}
    if flag(hf, "attention_k_eq_v") and hf["num_global_key_value_heads"] is not None:
        of_full["num_key_value_heads"] = integer(hf, "num_global_key_value_heads")
    heads = []
    for layer, layer_type in enumerate(hf["layer_types"]):
        given = of_full if layer_type == "full_attention" else {}
        if hf["per_layer_config"] is not None:
            given = mapping(mapping(hf, "per_layer_config"), str(layer))
            if unknown := given.keys() - own.keys():
                raise ValueError(f"config.json: per_layer_config of {', '.join(sorted(unknown))} is not supported")
        fields = {**own, **given}
        num_kv_heads, num_heads = integer(fields, "num_key_value_heads"), integer(hf, "num_attention_heads")
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_attention_heads {num_heads} must be a multiple of {num_kv_heads} KV heads (layer {layer})"
            )
        heads.append((num_kv_heads, integer(fields, "head_dim")))
    return tuple(heads)


def _kv_sources(hf: Fields) -> tuple[int, ...]:
    """The last layers read the keys and values of the last one before them that is of their type."""
    types = hf["layer_types"]
    first = len(types) - integer(hf, "num_kv_shared_layers", low=0, high=len(types) - 1)
    missing = set(types[first:]) - set(types[:first])
    if missing:
        raise ValueError(
            f"config.json: num_kv_shared_layers leaves no layer of type {missing.pop()!r} with keys and values"
        )
    last = {layer_type: layer for layer, layer_type in enumerate(types[:first])}
    return tuple(layer if layer < first else last[layer_type] for layer, layer_type in enumerate(types))


GEMMA4 = Architecture(
    serves="Gemma 4, text models: two sizes of heads, shared keys and values, per-layer embeddings, experts",
    proof="tests/models/test_gemma4.py",
    fields={
        **{"attention_bias": False, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "layer_types": None},
        **{"num_key_value_heads": 4, "sliding_window": 512, "tie_word_embeddings": True, "rms_norm_eps": 1e-6},
        **{"max_position_embeddings": 131072, "final_logit_softcapping": None, "use_bidirectional_attention": None},
        **{
            "attention_k_eq_v": False,
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
            "per_layer_config": None,
        },
        **{"global_head_dim": 512, "num_global_key_value_heads": None},
        **{"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144},
        **{"enable_moe_block": False, "num_experts": None, "top_k_experts": None, "moe_intermediate_size": None},
    },
    switches={
        "qk_norm": "head",
        "attention_scale": 1.0,
        "embedding_scale": lambda hf: hf["hidden_size"] ** 0.5,
        "layer_heads": _layer_heads,
        "kv_sources": _kv_sources,
    },
    translate=_gemma4,
    model="nanovllm.models.gemma4:Gemma4ForCausalLM",
)
