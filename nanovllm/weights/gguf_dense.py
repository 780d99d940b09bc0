"""GGUF rows of the dense families in `models/dense_families.py`, and of some whose fields are few.

Owns what their metadata mean. Invariant: as in `gguf_architectures.py`, defaults of missing keys are llama.cpp's.
"""

from collections.abc import Mapping

from nanovllm.weights.gguf_metadata import GGUFMetadata
from nanovllm.weights.gguf_row import (
    NORMS_AFTER,
    Fields,
    GGUFArchitecture,
    as_convolution,
    granite_fields,
    layer_types,
    partial_rotary_factor,
)

_NO_BIAS_FIELDS = {"attention_bias": None, "mlp_bias": None}  # of families whose config.json has one for all


def _has(metadata: GGUFMetadata, tensor: str) -> bool:
    return tensor in metadata.file.tensors


def _use_bias(metadata: GGUFMetadata, common: Fields) -> Fields:
    return {**_NO_BIAS_FIELDS, "use_bias": common["attention_bias"]}


def _seed_oss(metadata: GGUFMetadata, common: Fields) -> Fields:
    return {"attention_out_bias": _has(metadata, "blk.0.attn_output.bias")}


def _olmo(metadata: GGUFMetadata, common: Fields) -> Fields:
    """OLMo 3 where there is a window: only the rotation of layers without one is stretched."""
    window = metadata.integer("attention.sliding_window", 0)
    if not window:
        return {}
    theta = common["rope_theta"]
    return {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "sliding_window": window,
        "layer_types": layer_types(metadata, common, period=4),
        "rope_parameters": {
            "full_attention": {"rope_type": "default", **(common["rope_scaling"] or {}), "rope_theta": theta},
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": metadata.number("rope.freq_base_swa", theta),
            },
        },
        "rope_theta": None,
        "rope_scaling": None,
    }


def _exaone4(metadata: GGUFMetadata, common: Fields) -> Fields:
    """Files of the 32B, the one with 64 layers, may leave its window out."""
    window = metadata.integer("attention.sliding_window", 4096 if common["num_hidden_layers"] == 64 else 0)
    return {"sliding_window": window or None, "layer_types": layer_types(metadata, common, period=4)}


def _granite(metadata: GGUFMetadata, common: Fields) -> Fields:
    """Files of Granite 4 without Mamba layers and experts keep sizes of both."""
    if not metadata.integer("expert_count", 0):
        metadata.ignore("expert_shared_feed_forward_length", "ssm.conv_kernel", "ssm.group_count", "ssm.inner_size")
        metadata.ignore("ssm.state_size", "ssm.time_step_rank")
    return granite_fields(metadata, common)


def _glm4(metadata: GGUFMetadata, common: Fields) -> Fields:
    return {"partial_rotary_factor": partial_rotary_factor(metadata, common)}


def _cohere(metadata: GGUFMetadata, common: Fields) -> Fields:
    return {"logit_scale": metadata.number("logit_scale")}


def _cohere2(metadata: GGUFMetadata, common: Fields) -> Fields:
    window = metadata.integer("attention.sliding_window")
    return {
        **_cohere(metadata, common),
        "sliding_window": window,
        "layer_types": layer_types(metadata, common, period=4),
    }


def _mistral3(metadata: GGUFMetadata, common: Fields) -> Fields:
    """Mistral Small 3, or Ministral 3 where queries are scaled."""
    beta = metadata.number("attention.temperature_scale", 0.0)
    if not beta:
        return {"sliding_window": None}
    scaling = common["rope_scaling"] or {}
    original = metadata.integer("attention.temperature_length", scaling.get("original_max_position_embeddings", 0))
    if scaling.get("rope_type") != "yarn" or original != scaling["original_max_position_embeddings"]:
        raise NotImplementedError(
            f"{metadata.file.path}: attention.temperature_scale without YaRN from the same length is not supported"
        )
    even = metadata.number("rope.scaling.yarn_log_multiplier", 0.0)
    sharpness = {"mscale": 1.0, "mscale_all_dim": even} if even else {}
    return {
        "architectures": ["Ministral3ForCausalLM"],
        "model_type": "ministral3",
        "sliding_window": None,
        "rope_parameters": {
            **scaling,
            **sharpness,
            "rope_theta": common["rope_theta"],
            "llama_4_scaling_beta": beta,
        },
        "rope_theta": None,
        "rope_scaling": None,
    }


def _lfm2(metadata: GGUFMetadata, common: Fields) -> Fields:
    """Layers without key/value heads have a convolution; the width of the MLP is that of its tensors."""
    kv_heads = metadata.each_layer("attention.head_count_kv", common["num_hidden_layers"])
    return {
        **_NO_BIAS_FIELDS,
        "hidden_act": None,
        "rms_norm_eps": None,
        "norm_eps": common["rms_norm_eps"],
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": metadata.integer("shortconv.l_cache"),
        "layer_types": ["full_attention" if count else "conv" for count in kv_heads],
    }


_LFM2_NAMES = {
    **{"attn_norm": "operator_norm", "ffn_norm": "ffn_norm", "attn_output": "self_attn.out_proj"},
    **{"attn_q_norm": "self_attn.q_layernorm", "attn_k_norm": "self_attn.k_layernorm"},
    **{"ffn_gate": "feed_forward.w1", "ffn_up": "feed_forward.w3", "ffn_down": "feed_forward.w2"},
    **{"shortconv.conv": "conv.conv", "shortconv.in_proj": "conv.in_proj", "shortconv.out_proj": "conv.out_proj"},
}
_GLM4_NAMES = {
    "post_attention_norm": "post_self_attn_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
    "ffn_up": "mlp.gate_up_proj",
}

DENSE: Mapping[str, GGUFArchitecture] = {
    "lfm2": GGUFArchitecture(
        hf_class="Lfm2ForCausalLM",
        model_type="lfm2",
        names=_LFM2_NAMES,
        fields=_lfm2,
        has_states=True,
        transforms={"shortconv.conv": as_convolution},
    ),
    "gemma": GGUFArchitecture(
        hf_class="GemmaForCausalLM",
        model_type="gemma",
        fields=lambda metadata, common: {"hidden_act": "gelu_pytorch_tanh"},
        norm_offset=1.0,
    ),
    "seed_oss": GGUFArchitecture(
        hf_class="SeedOssForCausalLM",
        model_type="seed_oss",
        names={"post_attention_norm": "post_attention_layernorm"},
        fields=_seed_oss,
    ),
    "olmo2": GGUFArchitecture(hf_class="Olmo2ForCausalLM", model_type="olmo2", names=NORMS_AFTER, fields=_olmo),
    "exaone4": GGUFArchitecture(
        hf_class="Exaone4ForCausalLM", model_type="exaone4", names=NORMS_AFTER, fields=_exaone4
    ),
    "granite": GGUFArchitecture(hf_class="GraniteForCausalLM", model_type="granite", fields=_granite, has_pairs=True),
    "chatglm": GGUFArchitecture(
        hf_class="GlmForCausalLM",
        model_type="glm",
        names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        fields=_glm4,
        has_partial_rotary=True,
    ),
    "glm4": GGUFArchitecture(
        hf_class="Glm4ForCausalLM", model_type="glm4", names=_GLM4_NAMES, fields=_glm4, has_partial_rotary=True
    ),
    "ernie4_5": GGUFArchitecture(hf_class="Ernie4_5ForCausalLM", model_type="ernie4_5", fields=_use_bias),
    "arcee": GGUFArchitecture(
        hf_class="ArceeForCausalLM",
        model_type="arcee",
        fields=lambda metadata, common: {"hidden_act": "relu2"},
        has_pairs=True,
    ),
    "hunyuan-dense": GGUFArchitecture(
        hf_class="HunYuanDenseV1ForCausalLM",
        model_type="hunyuan_v1_dense",
        names={"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
    ),
    "starcoder2": GGUFArchitecture(
        hf_class="Starcoder2ForCausalLM",
        model_type="starcoder2",
        names={"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        fields=lambda metadata, common: {**_use_bias(metadata, common), "hidden_act": "gelu_pytorch_tanh"},
        layer_norm_eps="norm_epsilon",
    ),
    "command-r": GGUFArchitecture(
        hf_class="CohereForCausalLM", model_type="cohere", fields=_cohere, layer_norm_eps="layer_norm_eps"
    ),
    "cohere2": GGUFArchitecture(
        hf_class="Cohere2ForCausalLM", model_type="cohere2", fields=_cohere2, layer_norm_eps="layer_norm_eps"
    ),
    "apertus": GGUFArchitecture(
        hf_class="ApertusForCausalLM",
        model_type="apertus",
        names={"attn_norm": "attention_layernorm", "ffn_norm": "feedforward_layernorm"},
        fields=lambda metadata, common: {"hidden_act": "xielu"},
        numbers={f"xielu.{name}": f"mlp.act_fn.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")},
    ),
    "mistral3": GGUFArchitecture(hf_class="MistralForCausalLM", model_type="mistral", fields=_mistral3, has_pairs=True),
}
