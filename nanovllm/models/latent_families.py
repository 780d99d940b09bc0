"""Families with latent attention (MLA): rows of the table in `registry.py`.

Owns their fields and switches. Does not own the blocks: `latent.py`, and of experts `mixture.py`. Invariant: as in
`registry.py`, a row is plain data, and what it does not name is refused; a default is transformers'.
"""

from collections.abc import Mapping
from math import log
from typing import Any

from nanovllm.cache_specs import LatentShape
from nanovllm.models.architecture import Architecture
from nanovllm.models.hf_fields import flag, integer, mapping, number

Fields = Mapping[str, Any]
_PROOF = "tests/models/test_latent_families.py"


def latent_shape(hf: Fields) -> LatentShape:
    rank, rope_dim, nope_dim, value_dim = (
        integer(hf, name) for name in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    )
    query_rank = None if hf["q_lora_rank"] is None else integer(hf, "q_lora_rank")
    return LatentShape(rank, rope_dim, nope_dim, value_dim, query_rank)


def attention_scale(hf: Fields) -> float:
    """Of whole queries and keys; stretched as `mscale_all_dim` says, squared, as queries and keys would both be."""
    scale = (integer(hf, "qk_nope_head_dim") + integer(hf, "qk_rope_head_dim")) ** -0.5
    rope = mapping(hf, "rope_scaling") or mapping(hf, "rope_parameters")
    if (rope.get("rope_type") or rope.get("type") or "default") == "default" or not rope.get("mscale_all_dim"):
        return scale
    factor = number(rope, "factor")
    return scale if factor <= 1 else scale * (0.1 * number(rope, "mscale_all_dim") * log(factor) + 1.0) ** 2


def _as_rotated(hf: Fields) -> dict[str, Any]:
    """What turns is a part of a head by itself, and what is cached is the same for all heads."""
    whole = integer(hf, "qk_nope_head_dim") + integer(hf, "qk_rope_head_dim")
    if hf.get("qk_head_dim") not in (None, whole):
        raise ValueError(f"config.json: qk_head_dim={hf['qk_head_dim']!r} is not qk_nope_head_dim + qk_rope_head_dim")
    return {"head_dim": integer(hf, "qk_rope_head_dim"), "num_key_value_heads": 1, "qk_head_dim": None}


def _glm_layers(hf: Fields) -> dict[str, Any]:
    """Which layers have experts: transformers lists them, released checkpoints count those without."""
    types = hf["mlp_layer_types"]
    if types is None:
        return _as_rotated(hf)
    num_dense = next((i for i, kind in enumerate(types) if kind != "dense"), len(types))
    if len(types) != hf.get("num_hidden_layers") or any(kind != "sparse" for kind in types[num_dense:]):
        raise ValueError(f"config.json: mlp_layer_types={types!r}: only dense layers before sparse ones are supported")
    return {**_as_rotated(hf), "first_k_dense_replace": num_dense}


_LATENT: Mapping[str, Any] = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
_SWITCHES: Mapping[str, Any] = {
    "latent": latent_shape,
    "head_dim": lambda hf: integer(hf, "kv_lora_rank") + integer(hf, "qk_rope_head_dim"),
    "attention_scale": attention_scale,
}
_ROW: Mapping[str, Any] = {  # arguments of `Architecture`
    "proof": _PROOF,
    "translate": _as_rotated,
    "attention": "nanovllm.models.latent:LatentAttention",
}
# About training and expert parallelism; transformers does not look at them.
_UNREAD = dict.fromkeys(("aux_loss_alpha", "ep_size", "seq_aux"))

LATENT_FAMILIES: Mapping[str, Architecture] = {
    "DeepseekV2ForCausalLM": Architecture(
        serves="DeepSeek-V2, V2-Lite and Coder-V2: latent attention",
        fields={
            **{**_LATENT, **_UNREAD, "q_lora_rank": 1536, "mlp_bias": False, "vocab_size": 102400},
            **{"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": None},
            **{"moe_intermediate_size": 1407, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0},
            **{"n_group": None, "topk_group": None, "topk_method": "greedy", "norm_topk_prob": False},
            "scoring_func": "softmax",
        },
        switches={**_SWITCHES, "is_neox_style": False},
        mlp="nanovllm.models.mixture:deepseek_v2_moe",
        **_ROW,
    ),
    "DeepseekV3ForCausalLM": Architecture(
        serves="DeepSeek-V3 and R1, Moonlight, Kimi-K2: latent attention",
        fields={
            **{**_LATENT, **_UNREAD, "q_lora_rank": 1536, "rope_interleave": True, "vocab_size": 129280},
            **{"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "norm_topk_prob": True},
            **{"moe_intermediate_size": 2048, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5},
            **{"n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
            "num_nextn_predict_layers": 1,  # layers that loading leaves out
        },
        switches={**_SWITCHES, "is_neox_style": lambda hf: not flag(hf, "rope_interleave")},
        mlp="nanovllm.models.mixture:deepseek_moe",
        **_ROW,
    ),
    "Glm4MoeLiteForCausalLM": Architecture(
        serves="GLM-4.7-Flash: latent attention",
        fields={
            **{**_LATENT, "q_lora_rank": 768, "qk_nope_head_dim": 192, "v_head_dim": 256, "rope_interleave": True},
            **{"n_routed_experts": 64, "n_shared_experts": 1, "num_experts_per_tok": 4, "norm_topk_prob": True},
            **{"moe_intermediate_size": 1536, "routed_scaling_factor": 1.8, "n_group": 1, "topk_group": 1},
            **{"mlp_layer_types": None, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "rms_norm_eps": 1e-5},
            **{"first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "max_position_embeddings": 202752},
        },
        switches={**_SWITCHES, "is_neox_style": lambda hf: not flag(hf, "rope_interleave")},
        mlp="nanovllm.models.mixture:deepseek_moe",
        **{**_ROW, "translate": _glm_layers},
    ),
}
