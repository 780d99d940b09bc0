"""The GGUF architectures some of whose layers keep a state: one row each, as in `gguf_architectures.py`.

Owns the meaning of their metadata and tensor names, and what conversion did to their tensors. Invariant: what a file
does not say is what llama.cpp takes for it.

llama.cpp multiplies value heads with the key heads in turn, k0 k1 k0 k1; Hugging Face's are side by side, k0 k0 k1 k1.
Where there are more of them, conversion reorders what belongs to value heads; reading undoes it.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from nanovllm.weights.gguf_dense import DENSE
from nanovllm.weights.gguf_latent import SIGMOID
from nanovllm.weights.gguf_metadata import GGUFMetadata
from nanovllm.weights.gguf_mixtures import GRANITE_NAMES, QWEN2_NAMES, expert_names, local_experts
from nanovllm.weights.gguf_row import (
    Fields,
    GGUFArchitecture,
    as_convolution,
    as_row,
    granite_fields,
    partial_rotary_factor,
    without_prediction_heads,
)


def _has(metadata: GGUFMetadata, ending: str) -> bool:
    """Whether the name of a tensor ends so."""
    return any(name.endswith(ending) for name in metadata.file.tensors)


def decay(tensor: Tensor, config: Fields) -> Tensor:
    """Files hold -exp(A_log)."""
    return (-tensor.flatten()).log()


def _flat(tensor: Tensor, config: Fields) -> Tensor:
    return tensor.flatten()


# --- LFM2 --------------------------------------------------------------------------


def _lfm2_moe(metadata: GGUFMetadata, common: Fields) -> Fields:
    """llama.cpp lets the weights of a token's experts sum to one."""
    metadata.expect("expert_gating_func", SIGMOID)
    metadata.ignore("vocab_size")
    dense = DENSE["lfm2"].fields(metadata, common)
    return {
        **{name: value for name, value in dense.items() if name != "block_auto_adjust_ff_dim"},
        "num_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "moe_intermediate_size": metadata.integer("expert_feed_forward_length"),
        "num_dense_layers": metadata.integer("leading_dense_block_count", 0),
        "norm_topk_prob": True,
        "use_expert_bias": any(".exp_probs_b" in name for name in metadata.file.tensors),
    }


# --- Qwen3-Next and 3.5 ------------------------------------------------------------


def _qwen(metadata: GGUFMetadata, common: Fields) -> Fields:
    """For text, the sections of a rotation are the same. Newer files say layer by layer which have a delta net."""
    metadata.ignore("rope.dimension_sections")
    heads = metadata.integer("ssm.time_step_rank")
    layers = without_prediction_heads(metadata, common)
    have_states = metadata.by_layer("attention.recurrent_layers")
    if isinstance(have_states, list):
        types = ["linear_attention" if has_state else "full_attention" for has_state in have_states]
        layers["layer_types"] = types[: layers["num_hidden_layers"]]
    return {
        **layers,
        "full_attention_interval": metadata.integer("full_attention_interval", 4),
        "partial_rotary_factor": partial_rotary_factor(metadata, common),
        "linear_conv_kernel_dim": metadata.integer("ssm.conv_kernel"),
        "linear_num_key_heads": metadata.integer("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": metadata.integer("ssm.state_size"),
        "linear_value_head_dim": metadata.integer("ssm.inner_size") // heads,
        "attention_bias": _has(metadata, "attn_q.bias"),
    }


def _qwen_moe(metadata: GGUFMetadata, common: Fields) -> Fields:
    """llama.cpp lets the weights of a token's experts sum to one."""
    return {
        **_qwen(metadata, common),
        "num_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "moe_intermediate_size": metadata.integer("expert_feed_forward_length"),
        "shared_expert_intermediate_size": metadata.integer("expert_shared_feed_forward_length"),
        "norm_topk_prob": True,
    }


def _value_order(config: Fields, size: int, first: int = 0) -> list[int]:
    """By place among Hugging Face's rows (or columns), the place in the file. size: of a head; first: rows before."""
    key_heads, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    places = np.arange(heads * size).reshape(heads // key_heads, key_heads, size).swapaxes(0, 1)
    return [*range(first), *(first + places.flatten()).tolist()]


def _rows_of_channels(config: Fields) -> list[int]:
    keys = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    return _value_order(config, config["linear_value_head_dim"], keys)


def _columns_of_values(tensor: Tensor, config: Fields) -> Tensor:
    return tensor[:, _value_order(config, config["linear_value_head_dim"])]


_QWEN35 = GGUFArchitecture(
    hf_class="Qwen3_5ForCausalLM",
    model_type="qwen3_5_text",
    names={
        **{"post_attention_norm": "post_attention_layernorm", "attn_qkv": "linear_attn.in_proj_qkv"},
        **{"attn_gate": "linear_attn.in_proj_z", "ssm_beta": "linear_attn.in_proj_b"},
        **{"ssm_alpha": "linear_attn.in_proj_a", "ssm_a": "linear_attn.A_log", "ssm_dt": "linear_attn.dt_bias"},
        **{"ssm_conv1d": "linear_attn.conv1d", "ssm_norm": "linear_attn.norm", "ssm_out": "linear_attn.out_proj"},
    },
    fields=_qwen,
    norm_offset=1.0,
    has_partial_rotary=True,
    has_states=True,
    transforms={
        **{"ssm_a": decay, "ssm_conv1d": as_convolution, "ssm_out": _columns_of_values},
        "ssm_norm": _flat,  # as it is: nothing was added to this one
    },
    row_orders={
        **{"attn_qkv": _rows_of_channels, "ssm_conv1d": _rows_of_channels},
        "attn_gate": lambda config: _value_order(config, config["linear_value_head_dim"]),
        **dict.fromkeys(("ssm_beta", "ssm_alpha", "ssm_a", "ssm_dt"), lambda config: _value_order(config, 1)),
    },
)
_QWEN35_MOE = replace(
    _QWEN35,
    hf_class="Qwen3_5MoeForCausalLM",
    model_type="qwen3_5_moe_text",
    names={**_QWEN35.names, **QWEN2_NAMES},
    fields=_qwen_moe,
    transforms={**_QWEN35.transforms, "ffn_gate_inp_shexp": as_row},
)
# Its value heads are as Hugging Face's, and so are the matrices that hold several things head by head.
_QWEN3_NEXT = replace(
    _QWEN35_MOE,
    hf_class="Qwen3NextForCausalLM",
    model_type="qwen3_next",
    names={**_QWEN35_MOE.names, "ssm_ba": "linear_attn.in_proj_ba", "ssm_in": "linear_attn.in_proj_qkvz"},
    transforms={name: make for name, make in _QWEN35_MOE.transforms.items() if name != "ssm_out"},
    row_orders={},
)


# --- Mamba-2 -----------------------------------------------------------------------


def _granite_hybrid(metadata: GGUFMetadata, common: Fields) -> Fields:
    kv_heads = metadata.each_layer("attention.head_count_kv", common["num_hidden_layers"])
    has_experts = metadata.integer("expert_count", 0)
    up = "blk.0.ffn_up_shexp.weight" if has_experts else "blk.0.ffn_up.weight"
    metadata.ignore("expert_shared_feed_forward_length", "expert_used_count")
    experts = local_experts(metadata, common) if has_experts else {"num_local_experts": 0}
    is_rotated = metadata.flag("rope.scaling.finetuned", True)
    inner = metadata.integer("ssm.inner_size")
    return {
        **granite_fields(metadata, common, is_rotated=is_rotated),
        **experts,
        "shared_intermediate_size": metadata.file.tensors[up].shape[0],
        "position_embedding_type": "rope" if is_rotated else "nope",
        "layer_types": ["attention" if count else "mamba" for count in kv_heads],
        "mamba_n_heads": metadata.integer("ssm.time_step_rank"),
        "mamba_n_groups": metadata.integer("ssm.group_count"),
        "mamba_d_state": metadata.integer("ssm.state_size"),
        "mamba_d_conv": metadata.integer("ssm.conv_kernel"),
        "mamba_expand": inner // common["hidden_size"],
        "mamba_conv_bias": _has(metadata, "ssm_conv1d.bias"),
        "attention_bias": _has(metadata, "attn_q.bias"),
    }


_GRANITE_HYBRID = GGUFArchitecture(
    hf_class="GraniteMoeHybridForCausalLM",
    model_type="granitemoehybrid",
    names={
        **GRANITE_NAMES,
        **{"ffn_gate": "shared_mlp.gate", "ffn_up": "shared_mlp.up", "ffn_down": "shared_mlp.output_linear"},
        **{"ssm_in": "mamba.in_proj", "ssm_conv1d": "mamba.conv1d", "ssm_dt": "mamba.dt_bias", "ssm_a": "mamba.A_log"},
        **{"ssm_d": "mamba.D", "ssm_norm": "mamba.norm", "ssm_out": "mamba.out_proj"},
    },
    fields=_granite_hybrid,
    has_pairs=True,
    has_states=True,
    transforms={"ssm_a": decay, "ssm_d": _flat, "ssm_norm": _flat, "ssm_conv1d": as_convolution},
)


def _nemotron_h(metadata: GGUFMetadata, common: Fields) -> Fields:
    """Each layer is one of four; which one, its numbers of heads and of its MLP say, and that it has a router."""
    keys = "attention.head_count_kv", "feed_forward_length"
    kv_heads, widths = (metadata.each_layer(key, common["num_hidden_layers"]) for key in keys)
    metadata.expect("rope.scaling.finetuned", False)
    metadata.ignore("rope.dimension_count", "attention.layer_norm_epsilon")  # nothing is rotated; of further tokens
    layers = without_prediction_heads(metadata, common)
    heads = metadata.integer("ssm.time_step_rank")
    kinds = []
    for layer, (count, width) in enumerate(zip(kv_heads, widths, strict=True)):
        of_mlp = "moe" if f"blk.{layer}.ffn_gate_inp.weight" in metadata.file.tensors else "mlp"
        kinds.append("full_attention" if count else of_mlp if width else "linear_attention")
    return {
        **layers,
        "layers_block_type": kinds[: layers["num_hidden_layers"]],
        "layer_norm_epsilon": common["rms_norm_eps"],
        "mamba_num_heads": heads,
        "mamba_head_dim": metadata.integer("ssm.inner_size") // heads,
        "n_groups": metadata.integer("ssm.group_count"),
        "ssm_state_size": metadata.integer("ssm.state_size"),
        "conv_kernel": metadata.integer("ssm.conv_kernel"),
        "use_conv_bias": _has(metadata, "ssm_conv1d.bias"),
        "use_bias": _has(metadata, "ssm_in.bias"),
        "mlp_bias": _has(metadata, "ffn_up.bias"),
        "attention_bias": None,
    }


def _nemotron_h_moe(metadata: GGUFMetadata, common: Fields) -> Fields:
    return {
        **_nemotron_h(metadata, common),
        "n_routed_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "n_shared_experts": metadata.integer("expert_shared_count", 0),
        "moe_intermediate_size": metadata.integer("expert_feed_forward_length"),
        "moe_shared_expert_intermediate_size": metadata.integer("expert_shared_feed_forward_length"),
        "routed_scaling_factor": metadata.number("expert_weights_scale", 0.0) or 1.0,
        "norm_topk_prob": metadata.flag("expert_weights_norm"),
        "n_group": metadata.integer("expert_group_count", 0) or 1,
        "topk_group": metadata.integer("expert_group_used_count", 0) or 1,
    }


_NEMOTRON_H = GGUFArchitecture(
    hf_class="NemotronHForCausalLM",
    model_type="nemotron_h",
    names={
        **{"attn_norm": "norm", "attn_q": "mixer.q_proj", "attn_k": "mixer.k_proj", "attn_v": "mixer.v_proj"},
        **{"attn_output": "mixer.o_proj", "ffn_up": "mixer.up_proj", "ffn_down": "mixer.down_proj"},
        **{"ssm_in": "mixer.in_proj", "ssm_conv1d": "mixer.conv1d", "ssm_dt": "mixer.dt_bias", "ssm_a": "mixer.A_log"},
        **{"ssm_d": "mixer.D", "ssm_norm": "mixer.norm", "ssm_out": "mixer.out_proj"},
    },
    outer_names={"token_embd.weight": "model.embeddings.weight", "output_norm.weight": "model.norm_f.weight"},
    fields=_nemotron_h,
    has_partial_rotary=True,
    has_pairs=True,
    has_states=True,
    transforms=_GRANITE_HYBRID.transforms,
)

_NEMOTRON_EXPERTS = {
    **{"ffn_gate_inp": "mixer.gate", "exp_probs_b": "mixer.gate.e_score_correction_bias"},
    **{"ffn_up_exps": "mixer.experts.{}.up_proj", "ffn_down_exps": "mixer.experts.{}.down_proj"},
    **{"ffn_up_shexp": "mixer.shared_experts.up_proj", "ffn_down_shexp": "mixer.shared_experts.down_proj"},
}

STATES: Mapping[str, GGUFArchitecture] = {
    "lfm2moe": replace(
        DENSE["lfm2"],
        hf_class="Lfm2MoeForCausalLM",
        model_type="lfm2_moe",
        names={
            **DENSE["lfm2"].names,
            **expert_names("feed_forward", "gate", "w1", "w3", "w2"),
            "exp_probs_b": "feed_forward.expert_bias",
        },
        fields=_lfm2_moe,
    ),
    "qwen35": _QWEN35,
    "qwen35moe": _QWEN35_MOE,
    "qwen3next": _QWEN3_NEXT,
    "granitehybrid": _GRANITE_HYBRID,
    "nemotron_h": _NEMOTRON_H,
    "nemotron_h_moe": replace(_NEMOTRON_H, names={**_NEMOTRON_H.names, **_NEMOTRON_EXPERTS}, fields=_nemotron_h_moe),
}
