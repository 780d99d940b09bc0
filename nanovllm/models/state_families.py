"""Families some of whose layers keep a state in the place of keys and values: rows of the table in `registry.py`.

Owns their fields and switches, and what their config.json say in words of their own. Does not own the blocks that they
name. Invariant: as in `registry.py`, a row is plain data, and what it does not name is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nanovllm.cache_specs import StateShape
from nanovllm.models.architecture import Architecture
from nanovllm.models.hf_fields import flag, integer, items, number

Fields = Mapping[str, Any]
_PROOF = "tests/models/test_state_families.py"


# --- LFM2 --------------------------------------------------------------------------


def _lfm2(hf: Fields) -> dict[str, Any]:
    """Released checkpoints say which layers have attention, and a width of the MLP that is not yet cut and rounded."""
    layers = range(integer(hf, "num_hidden_layers"))
    with_attention: Sequence[int] = layers
    if hf["full_attn_idxs"] is not None:
        with_attention = items(hf, "full_attn_idxs", layers.__contains__, "layers")
    layer_types = hf["layer_types"] or ["full_attention" if i in with_attention else "conv" for i in layers]
    tie = hf["tie_word_embeddings"] if hf["tie_embedding"] is None else flag(hf, "tie_embedding")
    return {"layer_types": layer_types, "tie_word_embeddings": tie}


def _lfm2_width(hf: Fields) -> int:
    width = integer(hf, "intermediate_size" if hf["block_ff_dim"] is None else "block_ff_dim")
    if not flag(hf, "block_auto_adjust_ff_dim"):
        return width
    width = 2 * width // 3
    if hf["block_ffn_dim_multiplier"] is not None:
        multiple = integer(hf, "block_multiple_of")
        width = -(-int(number(hf, "block_ffn_dim_multiplier") * width) // multiple) * multiple
    return width


def _short_conv(hf: Fields) -> StateShape:
    return StateShape(integer(hf, "hidden_size"), integer(hf, "conv_L_cache", low=2, high=32))


_LFM2: Mapping[str, Any] = {
    **{"conv_L_cache": 3, "conv_bias": False, "layer_types": None, "full_attn_idxs": None, "norm_eps": 1e-5},
    **{"num_key_value_heads": 8, "rope_theta": 1000000.0, "tie_word_embeddings": True, "tie_embedding": None},
}
_LFM2_ROW: Mapping[str, Any] = {  # arguments of `Architecture`
    "proof": _PROOF,
    "translate": _lfm2,
    "states": {"conv": _short_conv},
    "model": "nanovllm.models.lfm2:Lfm2ForCausalLM",
    "attention": "nanovllm.models.lfm2:operator",
}
_LFM2_SWITCHES: Mapping[str, Any] = {
    "qk_norm": "head",
    "rms_norm_eps": lambda hf: number(hf, "norm_eps", at_least=0.0),
    "norm_names": {
        **{"before_attention": "operator_norm", "before_mlp": "ffn_norm"},
        **{"q_norm": "q_layernorm", "k_norm": "k_layernorm"},
    },
}
# Fields of released checkpoints that transformers does not look at.
_LFM2_UNREAD = dict.fromkeys(
    "block_dim block_mlp_init_scale block_norm_eps block_out_init_scale block_use_swiglu block_use_xavier_init "
    "conv_dim conv_dim_out conv_use_xavier_init num_heads theta use_pos_enc".split()
)

# --- Qwen3-Next and 3.5 ------------------------------------------------------------


def _qwen(hf: Fields) -> dict[str, Any]:
    """Every so many layers, one has attention."""
    interval = integer(hf, "full_attention_interval")
    layers = range(1, integer(hf, "num_hidden_layers") + 1)
    types = ["linear_attention" if layer % interval else "full_attention" for layer in layers]
    return {"layer_types": hf["layer_types"] or types}


def _without_sections(hf: Fields, layer_type: str, parameters: Fields) -> Fields:
    """For text, the three axes of a position are the same, and so it does not matter which turns which dimensions."""
    return {name: value for name, value in parameters.items() if name not in ("mrope_section", "mrope_interleaved")}


def _delta_net(hf: Fields) -> StateShape:
    key_heads, value_heads = integer(hf, "linear_num_key_heads"), integer(hf, "linear_num_value_heads")
    key_dim, value_dim = (integer(hf, f"linear_{part}_head_dim", high=256) for part in ("key", "value"))
    if value_heads % key_heads:
        raise ValueError(
            f"config.json: linear_num_value_heads {value_heads} must be a multiple of linear_num_key_heads {key_heads}"
        )
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    return StateShape(channels, integer(hf, "linear_conv_kernel_dim", low=2, high=32), value_heads, key_dim, value_dim)


_QWEN: Mapping[str, Any] = {
    **{"attention_bias": False, "head_dim": 256, "layer_types": None, "full_attention_interval": 4},
    **{"linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128},
    **{"linear_num_key_heads": 16, "linear_num_value_heads": 32, "partial_rotary_factor": 0.25},
    # Of released checkpoints; transformers does not look at them.
    **{"attn_output_gate": True, "mamba_ssm_dtype": "float32", "output_gate_type": "swish"},
    **{"mtp_num_hidden_layers": 0, "mtp_use_dedicated_embeddings": False, "num_nextn_predict_layers": 0},
}
_QWEN_MIXTURE: Mapping[str, Any] = {
    **{"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "decoder_sparse_step": 1},
    **{"mlp_only_layers": None, "norm_topk_prob": True, "use_sliding_window": False, "max_window_layers": 0},
    "sliding_window": None,
}
_QWEN_ROW: Mapping[str, Any] = {  # arguments of `Architecture`
    "proof": _PROOF,
    "switches": {"qk_norm": "head", "norm_offset": 1.0},
    "translate": _qwen,
    "rope": _without_sections,
    "states": {"linear_attention": _delta_net},
    "attention": "nanovllm.models.qwen3_next:mixer",
}

STATE_FAMILIES: Mapping[str, Architecture] = {
    "Lfm2ForCausalLM": Architecture(
        serves="LFM2, LFM2.5: short convolutions beside attention",
        fields={
            **_LFM2,
            **_LFM2_UNREAD,
            **{"block_auto_adjust_ff_dim": True, "block_ff_dim": None, "block_ffn_dim_multiplier": 1.0},
            "block_multiple_of": 256,
        },
        switches={**_LFM2_SWITCHES, "intermediate_size": _lfm2_width},
        mlp="nanovllm.models.lfm2:Lfm2MLP",
        **_LFM2_ROW,
    ),
    "Lfm2MoeForCausalLM": Architecture(
        serves="LFM2, mixtures of experts",
        fields={
            **_LFM2,
            **{"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 1792, "num_dense_layers": 2},
            **{"norm_topk_prob": True, "routed_scaling_factor": 1.0, "use_expert_bias": True},
        },
        switches=_LFM2_SWITCHES,
        mlp="nanovllm.models.mixture:lfm2_moe",
        **_LFM2_ROW,
    ),
    "Qwen3NextForCausalLM": Architecture(
        serves="Qwen3-Next: gated delta nets beside attention, mixtures of experts",
        fields={**_QWEN, **_QWEN_MIXTURE, "num_experts": 512, "num_experts_per_tok": 10, "num_key_value_heads": 2},
        mlp="nanovllm.models.mixture:qwen2_moe",
        **_QWEN_ROW,
    ),
    "Qwen3_5ForCausalLM": Architecture(
        serves="Qwen3.5 and 3.6: gated delta nets beside attention",
        fields={**_QWEN, "num_key_value_heads": 4},
        **_QWEN_ROW,
    ),
    "Qwen3_5MoeForCausalLM": Architecture(
        serves="Qwen3.5 and 3.6, mixtures of experts",
        fields={
            **{**_QWEN, **_QWEN_MIXTURE, "num_experts": 256, "num_experts_per_tok": 8, "num_key_value_heads": 2},
            "intermediate_size": 1,  # there is no MLP without experts
        },
        mlp="nanovllm.models.mixture:qwen2_moe",
        **_QWEN_ROW,
    ),
}
