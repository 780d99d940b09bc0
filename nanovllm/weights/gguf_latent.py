"""The GGUF architecture of latent attention, "deepseek2": DeepSeek-V2 and V3, by how their routers score.

Owns the meaning of its metadata and tensor names, and of the two tensors that newer files have in the place of one.
Invariant: as in `gguf_mixtures.py`.

    kv_b_proj of Hugging Face     of each head the rows that make its key, then those that make its value
    attn_kv_b                     the same
    attn_k_b, attn_v_b            [heads, rank, key], turned round, and [heads, value, rank]
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nanovllm.weights.gguf_metadata import GGUFMetadata
from nanovllm.weights.gguf_row import Fields, GGUFArchitecture, Join, without_prediction_heads

SIGMOID, _SOFTMAX = 2, 1  # llama.cpp's functions of the router; 0: files before it was written
LATENT_NAMES: Mapping[str, str] = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.kv_b_proj",
}


def _joined(k_b: Tensor, v_b: Tensor) -> Tensor:
    """kv_b_proj [heads * (key + value), rank] of the two."""
    return torch.cat((k_b.transpose(1, 2), v_b), dim=1).flatten(0, 1)


LATENT_JOINS: Mapping[str, Join] = {"attn_k_b": Join("attn_v_b", _joined)}


def _score(metadata: GGUFMetadata) -> int:
    """Files before the function was written are of DeepSeek-V2, or of GLM-4.7-Flash, which llama.cpp tells by this."""
    score = metadata.integer("expert_gating_func", 0)
    if score not in (0, _SOFTMAX, SIGMOID):
        metadata.expect("expert_gating_func", SIGMOID)
    vocab_size = metadata.file.tensors["token_embd.weight"].shape[0]
    is_glm = vocab_size == 154880 and metadata.integer("block_count") in (47, 48)
    return SIGMOID if not score and is_glm else score


def latent_row(metadata: GGUFMetadata, row: GGUFArchitecture) -> GGUFArchitecture:
    """For the functions of the router that there are. Raises NotImplementedError for another one."""
    if _score(metadata) == SIGMOID:
        return row
    return replace(row, hf_class="DeepseekV2ForCausalLM", model_type="deepseek_v2")


def latent_fields(metadata: GGUFMetadata, common: Fields, experts: Fields) -> Fields:
    """experts: fields about those. Newer files say key and value of what is cached, and `_mla` of what heads have."""
    rope_dim, rank = metadata.integer("rope.dimension_count"), metadata.integer("attention.kv_lora_rank")
    metadata.ignore("attention.key_length", "attention.value_length")
    suffix = "_mla" if metadata.has("attention.key_length_mla") else ""
    key, value = (metadata.integer(f"attention.{part}_length{suffix}") for part in ("key", "value"))
    fields: dict[str, Any] = {
        **experts,
        **without_prediction_heads(metadata, common),
        "kv_lora_rank": rank,
        "q_lora_rank": metadata.integer("attention.q_lora_rank", 0) or None,
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key - rope_dim,
        "v_head_dim": value,
        "head_dim": None,
        "num_key_value_heads": common["num_attention_heads"],
        "attention_bias": None,
        "mlp_bias": None,
    }
    if (scaling := common["rope_scaling"]) is not None and scaling["rope_type"] == "yarn":
        stretched = 10 * metadata.number("rope.scaling.yarn_log_multiplier", 0.0)
        fields["rope_scaling"] = {
            **scaling,
            **({"mscale": stretched, "mscale_all_dim": stretched} if stretched else {}),
        }
    if _score(metadata) != SIGMOID:
        has_groups = experts["topk_group"] < experts["n_group"]
        fields["topk_method"] = "group_limited_greedy" if has_groups else "greedy"
    return fields
