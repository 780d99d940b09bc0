"""Mixtures of experts that run: one row each, read top to bottom.

Owns their part of the table (`registry.py`). Does not own what the fields mean: `hf_config.py`, and of experts
`mixture.py`. Invariant: a default is transformers'.
"""

from collections.abc import Mapping
from typing import Any

from nanovllm.models.architecture import Architecture
from nanovllm.models.dense_families import GRANITE_MULTIPLIERS, HUNYUAN_ATTENTION, HUNYUAN_UNREAD
from nanovllm.models.hf_fields import flag

_PROOF = "tests/models/test_moe_parity.py"
_GRANITE = {**GRANITE_MULTIPLIERS, "attention_bias": False, "num_local_experts": 8, "num_experts_per_tok": 2}
_DEEPSEEK = {
    **{"attention_bias": False, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
    **{"moe_intermediate_size": 1408, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}

_GPT_OSS_ROPE = {
    **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    "original_max_position_embeddings": 4096,
}
_PREDICTION_HEADS = {"num_nextn_predict_layers": 0}  # layers that loading leaves out


def _gpt_oss(hf: Mapping[str, Any]) -> dict[str, Any]:
    """YaRN, where config.json does not say otherwise."""
    found: dict[str, Any] = {}
    if hf["num_experts"] is not None:
        found["num_local_experts"] = hf["num_experts"]
    if hf.get("rope_parameters") is None and hf.get("rope_scaling") is None:
        found["rope_scaling"] = _GPT_OSS_ROPE
    return found


MIXTURE_FAMILIES: Mapping[str, Architecture] = {
    "Qwen3MoeForCausalLM": Architecture(
        serves="Qwen3, mixture of experts",
        proof=_PROOF,
        fields={
            **{"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 0, "attention_bias": False},
            **{"num_experts": 128, "num_local_experts": None, "num_experts_per_tok": 8, "norm_topk_prob": False},
            **{"moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": None},
        },
        switches={"qk_norm": "head"},
        mlp="nanovllm.models.mixture:qwen3_moe",
    ),
    "MixtralForCausalLM": Architecture(
        serves="Mixtral",
        proof=_PROOF,
        fields={
            **{"sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2},
            **{"rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "num_key_value_heads": 8},
        },
        mlp="nanovllm.models.mixture:mixtral",
    ),
    "OlmoeForCausalLM": Architecture(
        serves="OLMoE",
        proof=_PROOF,
        fields={
            **{"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
            **{"rms_norm_eps": 1e-5, "attention_bias": False},
        },
        switches={"qk_norm": "projection"},
        mlp="nanovllm.models.mixture:olmoe",
    ),
    "Qwen2MoeForCausalLM": Architecture(
        serves="Qwen1.5-MoE, Qwen2-MoE: a shared expert",
        proof=_PROOF,
        fields={
            **{"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None},
            **{"num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False, "qkv_bias": True},
            **{"moe_intermediate_size": 1408, "decoder_sparse_step": 1, "mlp_only_layers": None},
            "shared_expert_intermediate_size": 5632,
        },
        switches={"qkv_bias": lambda hf: flag(hf, "qkv_bias"), "o_bias": False},
        mlp="nanovllm.models.mixture:qwen2_moe",
    ),
    "Glm4MoeForCausalLM": Architecture(
        serves="GLM-4.5, 4.6 and 4.7: a shared expert, sigmoid scores",
        proof=_PROOF,
        fields={
            **_DEEPSEEK,
            **{"n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8, "norm_topk_prob": True},
            **{"first_k_dense_replace": 1, "use_qk_norm": False, "partial_rotary_factor": 0.5},
            **{"rms_norm_eps": 1e-5, "num_key_value_heads": 8, **_PREDICTION_HEADS},
        },
        switches={"o_bias": False, "qk_norm": lambda hf: "head" if flag(hf, "use_qk_norm") else None},
        mlp="nanovllm.models.mixture:deepseek_moe",
    ),
    "Dots1ForCausalLM": Architecture(
        serves="dots.llm1: DeepSeek-V3's routing",
        proof=_PROOF,
        fields={
            **_DEEPSEEK,
            **{"n_routed_experts": None, "n_shared_experts": None, "num_experts_per_tok": None},
            **{"first_k_dense_replace": 0, "norm_topk_prob": False},
            **{"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 62, "layer_types": None},
        },
        switches={"qk_norm": "head"},
        mlp="nanovllm.models.mixture:deepseek_moe",
    ),
    "GraniteMoeForCausalLM": Architecture(
        serves="Granite 3.0 and 3.1, mixtures; PowerMoE",
        proof=_PROOF,
        fields=_GRANITE,
        mlp="nanovllm.models.mixture:granite_moe",
    ),
    "GraniteMoeSharedForCausalLM": Architecture(
        serves="Granite, mixtures with a shared expert",
        proof=_PROOF,
        fields={**_GRANITE, "shared_intermediate_size": 0},
        mlp="nanovllm.models.mixture:granite_moe",
    ),
    "Ernie4_5_MoeForCausalLM": Architecture(
        serves="ERNIE 4.5, mixtures: shared experts, a bias of the choice",
        proof=_PROOF,
        fields={
            **{"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True},
            **{"moe_k": 6, "moe_num_experts": 64, "moe_num_shared_experts": 2},
            **{"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1},
            **{"moe_intermediate_size": 1536, "moe_norm_min": 1e-12, **_PREDICTION_HEADS},
            # Of released checkpoints, about training; transformers does not look at them.
            **{"moe_capacity": None, "moe_gate": "topk", "moe_gate_act": "softmax"},
        },
        switches={"is_neox_style": False},
        mlp="nanovllm.models.mixture:ernie_moe",
    ),
    "GptOssForCausalLM": Architecture(
        serves="gpt-oss: sinks, windows in every other layer, biases of experts, MXFP4",
        proof="tests/models/test_gpt_oss.py",
        fields={
            **{"attention_bias": True, "head_dim": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
            **{"num_local_experts": 128, "num_experts": None, "num_experts_per_tok": 4, "experts_per_token": None},
            **{"sliding_window": 128, "layer_types": None, "sliding_window_pattern": 2},
            **{"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
            **{"max_position_embeddings": 131072, "rope_theta": 150000.0, "initial_context_length": None},
        },
        translate=_gpt_oss,
        attention="nanovllm.models.attention_variants:SinkAttention",
        mlp="nanovllm.models.mixture:gpt_oss_moe",
    ),
    "HunYuanMoEV1ForCausalLM": Architecture(
        serves="Hunyuan A13B: a shared expert",
        proof=_PROOF,
        fields={
            **{**HUNYUAN_UNREAD, "attention_bias": False, "rms_norm_eps": 1e-5, "num_experts": 1, "moe_topk": 1},
            # Of released checkpoints; transformers does not look at them.
            **{"capacity_factor": 1.0, "moe_drop_tokens": False, "moe_intermediate_size": None},
            **{"moe_layer_num_skipped": 0, "moe_random_routing_dropped_token": False, "norm_topk_prob": True},
            **{"num_shared_expert": 1, "routed_scaling_factor": 1.0, "use_mixed_mlp_moe": True},
        },
        mlp="nanovllm.models.mixture:hunyuan_moe",
        **HUNYUAN_ATTENTION,
    ),
}
