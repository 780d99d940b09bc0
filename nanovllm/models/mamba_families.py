"""Families with Mamba-2 layers: rows of the table in `registry.py`.

Owns their fields and switches, and what their config.json say in words of their own. Does not own the blocks that they
name. Invariant: as in `registry.py`, a row is plain data, and what it does not name is refused.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from nanovllm.cache_specs import StateShape
from nanovllm.models.architecture import Architecture
from nanovllm.models.dense_families import GRANITE_MULTIPLIERS
from nanovllm.models.hf_config import read_activation
from nanovllm.models.hf_fields import flag, integer, items, number

Fields = Mapping[str, Any]
_PROOF = "tests/models/test_mamba_families.py"


def _shape(hf: Fields, heads: int, head_dim: int, groups: str, state: str, width: str) -> StateShape:
    """groups, state, width: what the family calls these fields."""
    num_groups, state_dim = integer(hf, groups), integer(hf, state, high=256)
    if heads % num_groups:
        raise ValueError(f"config.json: {heads} Mamba-2 heads must be a multiple of {groups} {num_groups}")
    if head_dim > 256:
        raise ValueError(f"config.json: Mamba-2 heads of {head_dim} numbers are not supported; 256 are the most")
    channels = heads * head_dim + 2 * num_groups * state_dim
    return StateShape(channels, integer(hf, width, low=2, high=32), heads, state_dim, head_dim)


def _without_limit(hf: Fields) -> dict[str, Any]:
    """Steps have no bounds but 0, however infinity is spelled."""
    limit = hf["time_step_limit"]
    if limit is not None and list(limit) not in ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}]):
        raise ValueError(f"config.json: time_step_limit={limit!r} is not supported; only 0 to infinity is")
    return {"time_step_limit": None}


# --- Granite 4 ---------------------------------------------------------------------


def _if_positions_are_rotated(hf: Fields, layer_type: str, parameters: Fields) -> Fields | None:
    return parameters if hf["position_embedding_type"] == "rope" else None


def _granite(hf: Fields) -> dict[str, Any]:
    types = hf["layer_types"] or ["mamba"] * integer(hf, "num_hidden_layers")
    return {**_without_limit(hf), "layer_types": types}


def _granite_shape(hf: Fields) -> StateShape:
    heads, inner = integer(hf, "mamba_n_heads"), integer(hf, "mamba_expand") * integer(hf, "hidden_size")
    head_dim = inner // heads if hf["mamba_d_head"] in (None, "auto") else integer(hf, "mamba_d_head")
    if heads * head_dim != inner:
        raise ValueError(
            f"config.json: mamba_n_heads {heads} times mamba_d_head {head_dim} must be mamba_expand times hidden_size, "
            f"{inner}"
        )
    return _shape(hf, heads, head_dim, "mamba_n_groups", "mamba_d_state", "mamba_d_conv")


def _granite_width(hf: Fields) -> int:
    """Of the MLP, or of an expert."""
    has_experts = integer(hf, "num_local_experts", low=0)
    return integer(hf, "intermediate_size" if has_experts else "shared_intermediate_size")


# --- Nemotron-H --------------------------------------------------------------------


class NemotronLayer(NamedTuple):
    """A mixer, and what stands behind it: their places in the checkpoint's list, and what they are."""

    mixer: int
    is_mamba: bool
    mlp: int | None = None
    has_experts: bool = False


_KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_OLDER = {"mamba": "linear_attention", "attention": "full_attention"}


def nemotron_layers(hf: Fields) -> list[NemotronLayer]:
    """Of `layers_block_type` (transformers 5), or `hybrid_override_pattern`."""
    if hf["layers_block_type"] is not None:
        known = (*_KINDS.values(), *_OLDER)
        given = items(hf, "layers_block_type", known.__contains__, f"layer types ({', '.join(known)})")
        kinds = [_OLDER.get(kind, kind) for kind in given]
    else:
        pattern = hf["hybrid_override_pattern"]
        if not isinstance(pattern, str) or not set(pattern) <= set(_KINDS):
            raise ValueError(
                f"config.json: hybrid_override_pattern must be made of 'M', '*', '-', 'E', got {pattern!r}"
            )
        kinds = [_KINDS[letter] for letter in pattern]
    layers: list[NemotronLayer] = []
    for place, kind in enumerate(kinds):
        if kind in ("linear_attention", "full_attention"):
            layers.append(NemotronLayer(place, kind == "linear_attention"))
        elif not layers or layers[-1].mlp is not None:
            raise NotImplementedError(
                f"config.json: layer {place} is an MLP that no Mamba or attention layer stands before; that is not "
                "supported"
            )
        else:
            layers[-1] = layers[-1]._replace(mlp=place, has_experts=kind == "moe")
    return layers


def _nemotron(hf: Fields) -> dict[str, Any]:
    layers = nemotron_layers(hf)
    if hf["moe_latent_size"] is not None:
        raise NotImplementedError(f"config.json: moe_latent_size={hf['moe_latent_size']!r} is not supported yet")
    types = ["linear_attention" if layer.is_mamba else "full_attention" for layer in layers]
    head_dim = hf["attention_head_dim"] if hf.get("head_dim") is None else hf["head_dim"]
    return {
        **_without_limit(hf),
        **{"layer_types": types, "num_hidden_layers": len(layers), "head_dim": head_dim},
    }


def _nemotron_shape(hf: Fields) -> StateShape:
    if hf["mamba_hidden_act"] != "silu":
        raise ValueError(f"config.json: mamba_hidden_act={hf['mamba_hidden_act']!r} is not supported; only 'silu' is")
    heads, head_dim = integer(hf, "mamba_num_heads"), integer(hf, "mamba_head_dim")
    return _shape(hf, heads, head_dim, "n_groups", "ssm_state_size", "conv_kernel")


def _nemotron_activation(hf: Fields) -> str:
    return read_activation({"hidden_act": hf["mlp_hidden_act"]}, {"relu2": "relu2", "silu": "silu"})


# Fields of released checkpoints and of transformers that say how a model is trained, or how fast it is computed.
_NEMOTRON_UNREAD = dict.fromkeys(
    "attention_bias chunk_size expand hidden_dropout mamba_chunk_size mamba_dt_init_floor mamba_proj_bias "
    "mamba_ssm_cache_dtype mtp_hybrid_override_pattern mtp_layers_block_type num_logits_to_keep "
    "num_nextn_predict_layers rescale_prenorm_residual residual_in_fp32 time_step_floor time_step_max time_step_min "
    "use_mamba_kernels num_query_groups rms_norm_eps".split()
)

MAMBA_FAMILIES: Mapping[str, Architecture] = {
    "GraniteMoeHybridForCausalLM": Architecture(
        serves="Granite 4: Mamba-2 beside attention, dense and mixtures",
        proof=_PROOF,
        fields={
            **GRANITE_MULTIPLIERS,
            **{"attention_bias": False, "intermediate_size": 11008, "shared_intermediate_size": 1024},
            **{"layer_types": None, "num_local_experts": 8, "num_experts_per_tok": 2, "position_embedding_type": None},
            **{"mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_head": "auto"},
            **{"mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": True, "mamba_proj_bias": False},
            # Not looked at: by nobody, or where the size of a chunk is the kernels' own choice.
            **dict.fromkeys(("init_method", "normalization_function", "time_step_limit", "mamba_chunk_size")),
        },
        switches={"intermediate_size": _granite_width},
        translate=_granite,
        rope=_if_positions_are_rotated,
        states=dict.fromkeys(("mamba", "linear_attention"), _granite_shape),
        attention="nanovllm.models.granite_hybrid:mixer",
        mlp="nanovllm.models.granite_hybrid:mlp",
    ),
    "NemotronHForCausalLM": Architecture(
        serves="Nemotron-H, Nemotron Nano 2 and Nemotron 3 Nano: Mamba-2 beside attention",
        proof=_PROOF,
        fields={
            **_NEMOTRON_UNREAD,
            **{"layers_block_type": None, "hybrid_override_pattern": None, "layer_types": None},
            **{"attention_head_dim": 128, "num_key_value_heads": 8, "intermediate_size": 21504, "sliding_window": None},
            **{"mamba_num_heads": 128, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4},
            **{"mamba_hidden_act": "silu", "mlp_hidden_act": "relu2", "mlp_bias": False, "time_step_limit": None},
            **{"use_bias": False, "use_conv_bias": True, "layer_norm_epsilon": 1e-5},
            **{"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "norm_topk_prob": True},
            **{"moe_intermediate_size": 7688, "moe_shared_expert_intermediate_size": 7688, "moe_latent_size": None},
            **{"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "moe_shared_expert_overlap": True},
        },
        switches={
            **{"qkv_bias": False, "o_bias": False, "activation": _nemotron_activation},
            "rms_norm_eps": lambda hf: number(hf, "layer_norm_epsilon", at_least=0.0),
            "mlp_bias": lambda hf: flag(hf, "mlp_bias"),
        },
        translate=_nemotron,
        rope=lambda hf, layer_type, parameters: None,  # Mamba layers know the order of tokens
        states={"linear_attention": _nemotron_shape},
        model="nanovllm.models.nemotron_h:NemotronHForCausalLM",
        attention="nanovllm.models.nemotron_h:mixer",
        mlp="nanovllm.models.nemotron_h:mlp",
    ),
}
