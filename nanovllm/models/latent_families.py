"""Families with latent attention (MLA): rows of the table in `registry.py`.

Owns their fields and switches. Does not own the blocks: `latent.py`, and of experts `mixture.py`. Invariant: as in
`registry.py`, a row is plain data, and what it does not name is refused; a default is transformers'.
"""

from collections.abc import Mapping
from math import log
from typing import Any

from nanovllm.cache_specs import LatentShape, StateShape
from nanovllm.models.architecture import Architecture
from nanovllm.models.hf_fields import flag, integer, items, mapping, number

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


def _with_dense_layers(hf: Fields) -> dict[str, Any]:
    """Which layers have experts: transformers lists them, released checkpoints count those without."""
    types = hf["mlp_layer_types"]
    if types is None:
        return _as_rotated(hf)
    num_dense = next((i for i, kind in enumerate(types) if kind != "dense"), len(types))
    if len(types) != hf.get("num_hidden_layers") or any(kind != "sparse" for kind in types[num_dense:]):
        raise ValueError(f"config.json: mlp_layer_types={types!r}: only dense layers before sparse ones are supported")
    return {**_as_rotated(hf), "first_k_dense_replace": num_dense}


def _kimi(hf: Fields) -> dict[str, Any]:
    """DeepSeek-V3's fields under other names; which layers have which attention is in a part of its own, from 1 on."""
    linear, layers = mapping(hf, "linear_attn_config"), range(1, integer(hf, "num_hidden_layers") + 1)
    renamed = {
        **{"n_routed_experts": hf["num_experts"], "n_shared_experts": hf["num_shared_experts"]},
        **{"num_experts_per_tok": hf["num_experts_per_token"], "norm_topk_prob": hf["moe_renormalize"]},
        **{"n_group": hf["num_expert_group"], "max_position_embeddings": hf["model_max_length"]},
        "scoring_func": hf["moe_router_activation_func"],
    }
    if linear:
        kinds = {kind: items(linear, f"{kind}_layers", layers.__contains__, "layers") for kind in ("kda", "full_attn")}
        if sorted((*kinds["kda"], *kinds["full_attn"])) != list(layers):
            raise ValueError(
                f"config.json: linear_attn_config does not name each of {len(layers)} layers once: {linear}"
            )
        renamed |= {
            "layer_types": ["linear_attention" if i in kinds["kda"] else "full_attention" for i in layers],
            "linear_head_dim": linear.get("head_dim", hf["linear_head_dim"]),
            "linear_num_heads": linear.get("num_heads", hf["linear_num_heads"]),
            "linear_conv_kernel_dim": linear.get("short_conv_kernel_size", hf["linear_conv_kernel_dim"]),
        }
    elif hf["layer_types"] is None:
        renamed["layer_types"] = ["linear_attention" if i == 1 or i % 4 != 1 else "full_attention" for i in layers]
    for name, supported in (("mla_use_nope", True), ("use_grouped_topk", True), ("moe_layer_freq", 1)):
        if hf.get(name, supported) != supported:
            raise ValueError(f"config.json: {name}={hf[name]!r} is not supported; only {supported} is")
    return {**renamed, **_with_dense_layers({**hf, **renamed})}


def _kimi_delta(hf: Fields) -> StateShape:
    heads, dim = integer(hf, "linear_num_heads"), integer(hf, "linear_head_dim", high=256)
    return StateShape(3 * heads * dim, integer(hf, "linear_conv_kernel_dim", low=2, high=32), heads, dim, dim)


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
        **{**_ROW, "translate": _with_dense_layers},
    ),
    "KimiLinearForCausalLM": Architecture(
        serves="Kimi-Linear: Kimi delta attention beside latent attention",
        fields={
            **{
                **_LATENT,
                "q_lora_rank": None,
                "layer_types": None,
                "mlp_layer_types": None,
                "first_k_dense_replace": 1,
            },
            **{"linear_attn_config": None, "linear_head_dim": 128, "linear_num_heads": 32, "linear_conv_kernel_dim": 4},
            **{"num_experts": 256, "num_shared_experts": 1, "num_experts_per_token": 8, "moe_renormalize": True},
            **{"moe_intermediate_size": 1024, "num_expert_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446},
            **{"moe_router_activation_func": "sigmoid", "rms_norm_eps": 1e-5, "model_max_length": 1048576},
            **{"topk_method": "noaux_tc", "mla_use_nope": True, "use_grouped_topk": True},
            # What the translation makes of these.
            **dict.fromkeys(
                ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "norm_topk_prob", "n_group")
            ),
            "scoring_func": None,
        },
        switches=_SWITCHES,
        states={"linear_attention": _kimi_delta},
        rope=lambda hf, layer_type, parameters: None,
        mlp="nanovllm.models.kimi_linear:mlp",
        **{**_ROW, "translate": _kimi, "attention": "nanovllm.models.kimi_linear:mixer"},
    ),
}
