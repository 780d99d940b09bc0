"""The GGUF architecture of Kimi-Linear, "kimi-linear": Kimi delta attention in most layers, latent attention in others.

Owns the meaning of its metadata and tensor names. Invariant: as in `gguf_states.py`. Nothing in a file turns heads
round: both kinds of attention see no rotation.
"""

from collections.abc import Mapping

from torch import Tensor

from nanovllm.weights.gguf_latent import LATENT_JOINS, LATENT_NAMES, SIGMOID
from nanovllm.weights.gguf_metadata import GGUFMetadata
from nanovllm.weights.gguf_mixtures import expert_names, shared_names
from nanovllm.weights.gguf_row import Fields, GGUFArchitecture
from nanovllm.weights.gguf_states import decay

_BLOCK = "block_sparse_moe"


def _kimi(metadata: GGUFMetadata, common: Fields) -> Fields:
    """llama.cpp knows no groups of experts here, and lets the weights of a token's experts sum to one."""
    kv_heads = metadata.each_layer("attention.head_count_kv", common["num_hidden_layers"])
    metadata.expect("expert_gating_func", SIGMOID)
    metadata.ignore("attention.key_length", "attention.value_length")  # of what is cached
    metadata.ignore("expert_group_used_count")
    rope_dim = metadata.integer("rope.dimension_count")
    return {
        **dict.fromkeys(("attention_bias", "mlp_bias", "head_dim", "max_position_embeddings")),
        "num_key_value_heads": common["num_attention_heads"],
        "layer_types": ["full_attention" if count else "linear_attention" for count in kv_heads],
        "model_max_length": common["max_position_embeddings"],
        "linear_head_dim": metadata.integer("kda.head_dim"),
        "linear_num_heads": common["num_attention_heads"],
        "linear_conv_kernel_dim": metadata.integer("ssm.conv_kernel"),
        "kv_lora_rank": metadata.integer("attention.kv_lora_rank"),
        "q_lora_rank": metadata.integer("attention.q_lora_rank", 0) or None,
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": metadata.integer("attention.key_length_mla") - rope_dim,
        "v_head_dim": metadata.integer("attention.value_length_mla"),
        "num_experts": metadata.integer("expert_count"),
        "num_experts_per_token": metadata.integer("expert_used_count"),
        "num_shared_experts": metadata.integer("expert_shared_count", 0),
        "moe_intermediate_size": metadata.integer("expert_feed_forward_length"),
        "first_k_dense_replace": metadata.integer("leading_dense_block_count", 0),
        "routed_scaling_factor": metadata.number("expert_weights_scale", 0.0) or 1.0,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
    }


def _decay_of_heads(tensor: Tensor, config: Fields) -> Tensor:
    return decay(tensor, config).reshape(1, 1, -1, 1)


def _as_convolution(tensor: Tensor, config: Fields) -> Tensor:
    """Files have one more dimension of 1, or none."""
    return tensor.reshape(-1, 1, tensor.shape[-1])


KIMI: Mapping[str, GGUFArchitecture] = {
    "kimi-linear": GGUFArchitecture(
        hf_class="KimiLinearForCausalLM",
        model_type="kimi_linear",
        names={
            **LATENT_NAMES,
            **expert_names(_BLOCK, "gate", "w1", "w3", "w2"),
            **shared_names(f"{_BLOCK}.shared_experts"),
            **{f"ssm_conv1d_{part}": f"self_attn.{part}_conv1d" for part in "qkv"},
            **{f"ssm_{part}": f"self_attn.{part}_proj" for part in ("f_a", "f_b", "g_a", "g_b")},
            **{"ssm_beta": "self_attn.b_proj", "ssm_a": "self_attn.A_log", "ssm_dt": "self_attn.dt_bias"},
            **{"ssm_norm": "self_attn.o_norm", "exp_probs_b": f"{_BLOCK}.gate.e_score_correction_bias"},
        },
        fields=_kimi,
        has_partial_rotary=True,
        has_states=True,
        has_latents=True,
        joins=LATENT_JOINS,
        transforms={
            **{"ssm_a": _decay_of_heads},
            **dict.fromkeys((f"ssm_conv1d_{part}" for part in "qkv"), _as_convolution),
        },
    ),
}
