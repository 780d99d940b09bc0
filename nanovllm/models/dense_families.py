"""Dense families that differ from Llama's in more than sizes: rows of the table in `registry.py`.

Owns their fields and switches, and what their config.json say in words of their own. Does not own the blocks that some
of them name. Invariant: as in `registry.py`, a row is plain data, and what it does not name is refused.
"""

from collections.abc import Mapping
from typing import Any

from nanovllm.models.architecture import Architecture
from nanovllm.models.hf_config import read_activation
from nanovllm.models.hf_fields import flag, integer, number

Fields = Mapping[str, Any]

_PROOF = "tests/models/test_dense_families.py"
_USE_BIAS = {name: lambda hf: flag(hf, "use_bias") for name in ("qkv_bias", "o_bias", "mlp_bias")}


# --- rotation ----------------------------------------------------------------------


def _in_windows(hf: Fields, layer_type: str, parameters: Fields) -> Fields | None:
    """Layers that see all have no rotation."""
    return parameters if layer_type == "sliding_attention" and hf["sliding_window"] is not None else None


def _in_windows_if_any(hf: Fields, layer_type: str, parameters: Fields) -> Fields | None:
    """The same in models that have windows; in others, all layers rotate."""
    return parameters if hf["sliding_window"] is None else _in_windows(hf, layer_type, parameters)


def _with_alpha(hf: Fields, layer_type: str, parameters: Fields) -> Fields:
    """Hunyuan's "dynamic" does not look at the length, if it has an alpha: it is a larger base, and nothing else."""
    kind = parameters.get("rope_type") or parameters.get("type")
    if kind != "dynamic" or not parameters.get("alpha"):
        return parameters
    head_dim = integer(hf, "head_dim", low=4)
    base = {"rope_theta": parameters.get("rope_theta") or hf.get("rope_theta") or 10000.0}
    alpha = number(parameters, "alpha")
    return {"rope_type": "default", "rope_theta": number(base, "rope_theta") * alpha ** (head_dim / (head_dim - 2))}


def _with_query_scales(hf: Fields, layer_type: str, parameters: Fields) -> Fields:
    """Ministral 3 says here, too, how queries are scaled: `models/ministral3.py`."""
    number(parameters, "llama_4_scaling_beta", at_least=0.0)
    integer(parameters, "original_max_position_embeddings")
    own = ("llama_4_scaling_beta", "max_position_embeddings")
    return {name: value for name, value in parameters.items() if name not in own}


def _ungated(hf: Fields) -> str:
    return read_activation(hf, {"relu2": "relu2", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"})


# Fields of released checkpoints that transformers does not look at.
_STARCODER2_UNREAD = {
    **{"attention_softmax_in_fp32": True, "embedding_dropout": 0.0, "layer_norm_epsilon": 1e-5, "mlp_type": "default"},
    **{"norm_type": "layer_norm", "residual_dropout": 0.0, "scale_attention_softmax_in_fp32": True},
    "scale_attn_weights": True,
}
HUNYUAN_UNREAD: Mapping[str, Any] = dict.fromkeys(
    "add_classification_head attention_head_dim cla_share_factor class_num dense_list enable_lm_head_fp32 eod_token_id "
    "group_limited_greedy im_end_id im_newline_id im_start_id image_token_id mask_init_id mlp_bias norm_type "
    "org_vocab_size pad_id pool_type position_embedding_xdrope skip_cls_token text_end_id text_start_id use_cla "
    "use_qk_norm use_rotary_pos_emb video_end_id video_start_id".split()
)
HUNYUAN_ATTENTION: Mapping[str, Any] = {  # arguments of `Architecture`
    "switches": {"qk_norm": "head", "norm_names": {"q_norm": "query_layernorm", "k_norm": "key_layernorm"}},
    "rope": _with_alpha,
    "attention": "nanovllm.models.attention_variants:NormAfterRotation",
}
GRANITE_MULTIPLIERS: Mapping[str, Any] = dict.fromkeys(
    ("attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"), 1.0
)
_GLM = {
    **{"attention_bias": True, "head_dim": 128, "num_key_value_heads": 2},
    **{"partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-07},
}
_GLM_SWITCHES = {"o_bias": False, "is_neox_style": False}
_COHERE = {
    **{"attention_bias": False, "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "tie_word_embeddings": True},
    # Of released checkpoints; transformers does not look at them.
    **{"position_embedding_type": "rope_gptj", "rotary_pct": 1.0, "order_of_interleaved_layers": "local_attn_first"},
    **{"use_embedding_sharing": True, "use_gated_activation": True, "use_parallel_block": True},
    "use_parallel_embedding": False,
}
_COHERE_SWITCHES = {
    **{"norms": "shared", "is_neox_style": False},
    "rms_norm_eps": lambda hf: number(hf, "layer_norm_eps", at_least=0.0),
    "logits_scale": lambda hf: number(hf, "logit_scale"),
}

DENSE_FAMILIES: Mapping[str, Architecture] = {
    "Olmo3ForCausalLM": Architecture(
        serves="OLMo 3: windows in three layers of four",
        proof=_PROOF,
        fields={
            **{"attention_bias": False, "layer_types": None, "rms_norm_eps": 1e-5},
            **{"sliding_window": 4096, "sliding_window_pattern": 4},
            # Of the layers with a window: only the rotation of the others is stretched for long inputs.
            **{"rope_local_base_freq": 500000.0, "rope_theta": 500000.0},
        },
        switches={"norms": "after", "qk_norm": "projection"},
    ),
    "Exaone4ForCausalLM": Architecture(
        serves="EXAONE 4",
        proof=_PROOF,
        fields={
            **{"layer_types": None, "num_key_value_heads": 32, "rms_norm_eps": 1e-5},
            **{"sliding_window": 4096, "sliding_window_pattern": 4},
        },
        switches={"norms": "after", "qk_norm": "head"},
        rope=_in_windows_if_any,
    ),
    "GlmForCausalLM": Architecture(serves="GLM-4 9B", proof=_PROOF, fields=_GLM, switches=_GLM_SWITCHES),
    "Glm4ForCausalLM": Architecture(
        serves="GLM-4 0414 and GLM-Z1",
        proof=_PROOF,
        fields=_GLM,
        switches={
            **_GLM_SWITCHES,
            "norms": "both",
            "norm_names": {
                "after_attention": "post_self_attn_layernorm",
                "before_mlp": "post_attention_layernorm",
                "after_mlp": "post_mlp_layernorm",
            },
        },
    ),
    "Ernie4_5ForCausalLM": Architecture(
        serves="ERNIE 4.5, dense",
        proof=_PROOF,
        fields={
            **{"head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
            **{"tie_word_embeddings": True, "use_bias": False},
        },
        switches={**_USE_BIAS, "is_neox_style": False},
    ),
    "ArceeForCausalLM": Architecture(
        serves="Arcee AFM: an MLP without a gate",
        proof=_PROOF,
        fields={"attention_bias": False, "hidden_act": "relu2", "mlp_bias": False, "rms_norm_eps": 1e-5},
        switches={"activation": _ungated},
        mlp="nanovllm.models.ungated:UngatedMLP",
    ),
    "HunYuanDenseV1ForCausalLM": Architecture(
        serves="Hunyuan, dense",
        proof=_PROOF,
        fields={**HUNYUAN_UNREAD, "attention_bias": False, "rms_norm_eps": 1e-5},
        **HUNYUAN_ATTENTION,
    ),
    "Starcoder2ForCausalLM": Architecture(
        serves="StarCoder 2",
        proof=_PROOF,
        fields={
            **_STARCODER2_UNREAD,
            **{"hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "num_key_value_heads": 2},
            **{"sliding_window": None, "tie_word_embeddings": True, "use_bias": True},
        },
        switches={
            **_USE_BIAS,
            "activation": _ungated,
            "rms_norm_eps": lambda hf: number(hf, "norm_epsilon", at_least=0.0),
        },
        norm="nanovllm.layers.layer_norm:with_bias",
        mlp="nanovllm.models.ungated:StarCoder2MLP",
    ),
    "CohereForCausalLM": Architecture(
        serves="Command R",
        proof=_PROOF,
        fields={**_COHERE, "rope_theta": 500000.0},
        switches=_COHERE_SWITCHES,
        norm="nanovllm.layers.layer_norm:without_bias",
    ),
    "Cohere2ForCausalLM": Architecture(
        serves="Command R7B and A, Aya: windows in three layers of four, rotation only there",
        proof=_PROOF,
        fields={**_COHERE, "layer_types": None, "sliding_window": 4096, "sliding_window_pattern": 4},
        switches=_COHERE_SWITCHES,
        rope=_in_windows,
        norm="nanovllm.layers.layer_norm:without_bias",
    ),
    "ApertusForCausalLM": Architecture(
        serves="Apertus: an MLP without a gate, xIELU",
        proof=_PROOF,
        fields={
            **{"attention_bias": False, "hidden_act": "xielu", "rms_norm_eps": 1e-5, "post_norm": False},
            "rope_theta": 12000000.0,
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 12000000.0, "factor": 8.0},
                **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
            },
        },
        switches={
            "activation": lambda hf: read_activation(hf, {"xielu": "xielu"}),
            "qk_norm": "head",
            "norm_names": {"before_attention": "attention_layernorm", "before_mlp": "feedforward_layernorm"},
        },
        mlp="nanovllm.models.ungated:XIELUMLP",
    ),
    "Ministral3ForCausalLM": Architecture(
        serves="Ministral 3",
        proof=_PROOF,
        fields={
            **{"head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "sliding_window": None},
            "rope_scaling": None,
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0},
                **{"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384},
                "llama_4_scaling_beta": 0.1,
            },
        },
        rope=_with_query_scales,
        model="nanovllm.models.ministral3:Ministral3ForCausalLM",
    ),
}
