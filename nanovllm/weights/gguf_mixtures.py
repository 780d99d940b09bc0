"""The GGUF architectures that are mixtures of experts: one row each, as in `gguf_architectures.py`.

Owns the meaning of their metadata and tensor names, in Hugging Face's terms. Invariant: what a file does not say is
what llama.cpp takes for it.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nanovllm.weights.gguf_latent import LATENT_JOINS, LATENT_NAMES, SIGMOID, latent_fields, latent_row
from nanovllm.weights.gguf_metadata import GGUFMetadata
from nanovllm.weights.gguf_row import (
    Fields,
    GGUFArchitecture,
    Join,
    as_row,
    granite_fields,
    layer_types,
    partial_rotary_factor,
    without_prediction_heads,
)


def expert_names(block: str, router: str, gate: str, up: str, down: str) -> dict[str, str]:
    return {
        "ffn_gate_inp": f"{block}.{router}",
        "ffn_gate_exps": f"{block}.experts.{{}}.{gate}",
        "ffn_up_exps": f"{block}.experts.{{}}.{up}",
        "ffn_down_exps": f"{block}.experts.{{}}.{down}",
    }


def shared_names(block: str, down: str = "down_proj") -> dict[str, str]:
    parts = {"gate": "gate_proj", "up": "up_proj", "down": down}
    return {f"ffn_{part}_shexp": f"{block}.{name}" for part, name in parts.items()}


_NAMES = {
    **expert_names("mlp", "gate", "gate_proj", "up_proj", "down_proj"),
    "ffn_gate_up_exps.weight": "mlp.experts.gate_up_proj",
}
QWEN2_NAMES = {**_NAMES, **shared_names("mlp.shared_expert"), "ffn_gate_inp_shexp": "mlp.shared_expert_gate"}
_DEEPSEEK_NAMES = {**_NAMES, **shared_names("mlp.shared_experts"), "exp_probs_b": "mlp.gate.e_score_correction_bias"}
_ERNIE_NAMES = {**_DEEPSEEK_NAMES, "exp_probs_b": "mlp.moe_statics.e_score_correction_bias"}
_HUNYUAN_NAMES = {
    **{**_NAMES, **shared_names("mlp.shared_mlp"), "ffn_gate_inp": "mlp.gate.wg"},
    **{"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
}
_GPT_OSS_NAMES = {
    **{"post_attention_norm": "post_attention_layernorm", "attn_sinks.weight": "self_attn.sinks"},
    **{"ffn_gate_inp": "mlp.router", "ffn_gate_exps.weight": "mlp.experts.gate_up_proj"},
    **{"ffn_gate_exps.bias": "mlp.experts.gate_up_proj_bias", "ffn_down_exps.weight": "mlp.experts.down_proj"},
    "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
}
GRANITE_NAMES = {
    **expert_names("block_sparse_moe", "router.layer", "gate_proj", "up_proj", "down_proj"),
    **shared_names("shared_mlp", "output_linear"),
}


def local_experts(metadata: GGUFMetadata, common: Fields) -> Fields:
    return {
        "num_local_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
    }


def _olmoe(metadata: GGUFMetadata, common: Fields) -> Fields:
    """llama.cpp does not let the weights of a token's experts sum to one."""
    experts = local_experts(metadata, common)
    return {"num_experts": experts["num_local_experts"], "num_experts_per_tok": experts["num_experts_per_tok"]}


def _expert_size(metadata: GGUFMetadata, common: Fields) -> int:
    num_chosen = max(1, metadata.integer("expert_used_count"))
    return metadata.integer("expert_feed_forward_length", common["intermediate_size"] // num_chosen)


def _qwen3_moe(metadata: GGUFMetadata, common: Fields) -> Fields:
    """llama.cpp lets the weights of a token's experts sum to one."""
    size = _expert_size(metadata, common)
    return {**local_experts(metadata, common), "moe_intermediate_size": size, "norm_topk_prob": True}


def _qwen2_moe(metadata: GGUFMetadata, common: Fields) -> Fields:
    """llama.cpp does not let the weights of a token's experts sum to one."""
    size = metadata.integer("expert_shared_feed_forward_length", common["intermediate_size"])
    return {
        **_olmoe(metadata, common),
        "moe_intermediate_size": _expert_size(metadata, common),
        "shared_expert_intermediate_size": size,
        "qkv_bias": common["attention_bias"],
        "attention_bias": None,
    }


def _deepseek(metadata: GGUFMetadata, common: Fields) -> Fields:
    metadata.expect("expert_gating_func", SIGMOID)
    return _deepseek_experts(metadata, common)


def _deepseek_experts(metadata: GGUFMetadata, common: Fields) -> Fields:
    return {
        "n_routed_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "moe_intermediate_size": _expert_size(metadata, common),
        "n_shared_experts": metadata.integer("expert_shared_count", 0),
        "first_k_dense_replace": metadata.integer("leading_dense_block_count", 0),
        "routed_scaling_factor": metadata.number("expert_weights_scale", 0.0) or 1.0,
        "norm_topk_prob": metadata.flag("expert_weights_norm"),
        "n_group": metadata.integer("expert_group_count", 0) or 1,
        "topk_group": metadata.integer("expert_group_used_count", 0) or 1,
    }


def _glm4_moe(metadata: GGUFMetadata, common: Fields) -> Fields:
    return {
        **_deepseek(metadata, common),
        **without_prediction_heads(metadata, common),
        "partial_rotary_factor": partial_rotary_factor(metadata, common),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in metadata.file.tensors,
    }


def _deepseek2(metadata: GGUFMetadata, common: Fields) -> Fields:
    return latent_fields(metadata, common, _deepseek_experts(metadata, common))


def _dots1(metadata: GGUFMetadata, common: Fields) -> Fields:
    return {**_deepseek(metadata, common), "sliding_window": None}


def _ernie(metadata: GGUFMetadata, common: Fields) -> Fields:
    """The width of its shared experts is written in a way that fits some models only; their tensors say it, too."""
    metadata.integer("expert_shared_feed_forward_length", 0)
    return {
        "moe_num_experts": metadata.integer("expert_count"),
        "moe_k": metadata.integer("expert_used_count"),
        "moe_intermediate_size": _expert_size(metadata, common),
        "moe_num_shared_experts": metadata.integer("expert_shared_count", 0),
        "moe_layer_start_index": metadata.integer("leading_dense_block_count", 0),
        "moe_layer_interval": metadata.integer("interleave_moe_layer_step", 1),
    }


def _hunyuan_moe(metadata: GGUFMetadata, common: Fields) -> Fields:
    """All experts are as wide as the shared one, as transformers has them; alpha is in the base of the rotation."""
    for key in ("expert_feed_forward_length", "expert_shared_feed_forward_length"):
        metadata.expect(key, common["intermediate_size"])
    metadata.expect("expert_shared_count", 1)
    return {"num_experts": metadata.integer("expert_count"), "moe_topk": metadata.integer("expert_used_count")}


def _gpt_oss(metadata: GGUFMetadata, common: Fields) -> Fields:
    """Its YaRN is not rounded to whole dimensions; llama.cpp's always is, and files do not say."""
    metadata.expect("expert_feed_forward_length", common["intermediate_size"])
    scaling = common["rope_scaling"]
    return {
        **local_experts(metadata, common),
        "sliding_window": metadata.integer("attention.sliding_window"),
        "layer_types": layer_types(metadata, common, period=2),
        "rope_scaling": scaling and {**scaling, "truncate": False},
        "mlp_bias": None,
    }


def _in_turn(gate: Tensor, up: Tensor) -> Tensor:
    """Of each expert, the first row of either, then the second."""
    return torch.stack((gate, up), dim=2).flatten(1, 2)


def _inputs_first(tensor: Tensor, config: Fields) -> Tensor:
    return tensor.transpose(1, 2) if tensor.dim() == 3 else tensor


def _granite_moe(metadata: GGUFMetadata, common: Fields) -> Fields:
    return {**granite_fields(metadata, common), **local_experts(metadata, common)}


def _granite_moe_shared(metadata: GGUFMetadata, common: Fields) -> Fields:
    size = metadata.integer("expert_shared_feed_forward_length")
    return {**_granite_moe(metadata, common), "shared_intermediate_size": size}


MIXTURES: Mapping[str, GGUFArchitecture] = {
    "qwen2moe": GGUFArchitecture(
        hf_class="Qwen2MoeForCausalLM",
        model_type="qwen2_moe",
        names=QWEN2_NAMES,
        fields=_qwen2_moe,
        transforms={"ffn_gate_inp_shexp": as_row},
    ),
    "qwen3moe": GGUFArchitecture(
        hf_class="Qwen3MoeForCausalLM", model_type="qwen3_moe", names=_NAMES, fields=_qwen3_moe
    ),
    "olmoe": GGUFArchitecture(hf_class="OlmoeForCausalLM", model_type="olmoe", names=_NAMES, fields=_olmoe),
    "glm4moe": GGUFArchitecture(
        hf_class="Glm4MoeForCausalLM",
        model_type="glm4_moe",
        names={**_DEEPSEEK_NAMES, "post_attention_norm": "post_attention_layernorm"},
        fields=_glm4_moe,
        has_partial_rotary=True,
    ),
    "deepseek2": GGUFArchitecture(
        hf_class="DeepseekV3ForCausalLM",
        model_type="deepseek_v3",
        names={**_DEEPSEEK_NAMES, **LATENT_NAMES},
        fields=_deepseek2,
        has_partial_rotary=True,
        has_latents=True,
        joins=LATENT_JOINS,
    ),
    "dots1": GGUFArchitecture(hf_class="Dots1ForCausalLM", model_type="dots1", names=_DEEPSEEK_NAMES, fields=_dots1),
    "ernie4_5-moe": GGUFArchitecture(
        hf_class="Ernie4_5_MoeForCausalLM",
        model_type="ernie4_5_moe",
        names=_ERNIE_NAMES,
        fields=_ernie,
        transforms={"exp_probs_b": as_row},
    ),
    "gpt-oss": GGUFArchitecture(
        hf_class="GptOssForCausalLM",
        model_type="gpt_oss",
        names=_GPT_OSS_NAMES,
        fields=_gpt_oss,
        joins={"ffn_gate_exps": Join("ffn_up_exps", _in_turn)},
        transforms=dict.fromkeys(("ffn_gate_exps", "ffn_down_exps"), _inputs_first),
        keeps_mxfp4=True,
    ),
    "hunyuan-moe": GGUFArchitecture(
        hf_class="HunYuanMoEV1ForCausalLM", model_type="hunyuan_v1_moe", names=_HUNYUAN_NAMES, fields=_hunyuan_moe
    ),
    "granitemoe": GGUFArchitecture(
        hf_class="GraniteMoeForCausalLM",
        model_type="granitemoe",
        names=GRANITE_NAMES,
        fields=_granite_moe,
        has_pairs=True,
    ),
}
_MIXTRAL = GGUFArchitecture(
    hf_class="MixtralForCausalLM",
    model_type="mixtral",
    names=expert_names("block_sparse_moe", "gate", "w1", "w3", "w2"),
    fields=local_experts,
    has_pairs=True,
)
_GRANITE_SHARED = replace(
    MIXTURES["granitemoe"],
    hf_class="GraniteMoeSharedForCausalLM",
    model_type="granitemoeshared",
    fields=_granite_moe_shared,
)


def mixture_row(metadata: GGUFMetadata) -> GGUFArchitecture | None:
    """The row of a mixture that goes by the name of another architecture, or of several."""
    if metadata.prefix == "deepseek2":
        return latent_row(metadata, MIXTURES["deepseek2"])
    if metadata.prefix == "llama" and metadata.integer("expert_count", 0):
        return _MIXTRAL
    if metadata.prefix == "granitemoe" and metadata.integer("expert_shared_feed_forward_length", 0):
        return _GRANITE_SHARED
    return None
