"""What llama.cpp's converter does to layers that keep a state: their tensors, and what the metadata say of them."""

from collections.abc import Callable, Mapping
from typing import Any

import gguf
import numpy as np

Tensors = dict[str, np.ndarray]
_QWEN = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")


def with_states(tensors: Mapping[str, np.ndarray], hf: Mapping[str, Any]) -> Tensors:
    converted = dict(_converted(name, tensor, hf) for name, tensor in tensors.items())
    if hf["model_type"] == "qwen3_next":
        converted = _with_projections_apart(converted, hf)
    return converted


def _converted(name: str, tensor: np.ndarray, hf: Mapping[str, Any]) -> tuple[str, np.ndarray]:
    if hf["model_type"] == "nemotron_h":
        name = name.replace("model.", "backbone.", 1).replace("mixer.dt_bias", "mixer.dt.bias")
        if ".mixer.experts." in name:
            return name.replace("backbone.", "model.").replace(".mixer.", ".mlp."), tensor
    module = name.partition(".linear_attn.")[2] or name.partition(".mamba.")[2] or name.partition(".mixer.")[2]
    if ".feed_forward.experts." in name:
        for ours, usual in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            name = name.replace(f".{ours}.", f".{usual}.")
        return name.replace(".feed_forward.", ".mlp."), tensor
    if not module:
        return name.replace("expert_bias", "expert_bias.bias"), tensor
    if module == "A_log":
        tensor = -np.exp(tensor)
    elif module == "conv1d.weight":
        tensor = tensor[:, 0]
    if ".linear_attn." not in name:
        if module in ("A_log", "D"):
            tensor = tensor.reshape(-1, 1)
        elif module == "norm.weight":
            tensor = tensor.reshape(hf.get("mamba_n_groups") or hf["n_groups"], -1)
    elif hf["model_type"] != "qwen3_next":
        tensor = _in_turns(module, tensor, hf)
    return name.replace(".dt_bias", ".dt_proj.bias"), tensor


def _in_turns(module: str, tensor: np.ndarray, hf: Mapping[str, Any]) -> np.ndarray:
    """Qwen3.5's value heads in turns of their key heads."""
    heads, key_heads, size = (hf[f"linear_{part}"] for part in ("num_value_heads", "num_key_heads", "value_head_dim"))

    def tiled(rows: np.ndarray, size: int) -> np.ndarray:
        return rows.reshape(key_heads, heads // key_heads, size, -1).swapaxes(0, 1).reshape(rows.shape)

    if module in ("in_proj_qkv.weight", "conv1d.weight"):
        keys = 2 * key_heads * hf["linear_key_head_dim"]
        return np.concatenate((tensor[:keys], tiled(tensor[keys:], size)))
    if module in ("A_log", "dt_bias", "in_proj_a.weight", "in_proj_b.weight"):
        return tiled(tensor, 1)
    if module == "in_proj_z.weight":
        return tiled(tensor, size)
    if module == "out_proj.weight":
        return np.ascontiguousarray(tiled(np.ascontiguousarray(tensor.T), size).T)
    return tensor


def _with_projections_apart(tensors: Tensors, hf: Mapping[str, Any]) -> Tensors:
    """Qwen3-Next's matrix of queries, keys, values and gates, one key head after another, as two of all heads."""
    key_heads, heads = hf["linear_num_key_heads"], hf["linear_num_value_heads"]
    key_dim, values = hf["linear_key_head_dim"], heads // key_heads * hf["linear_value_head_dim"]
    apart = {}
    for name, tensor in tensors.items():
        layer, found, _ = name.partition("in_proj_qkvz")
        if found:
            by_head = tensor.reshape(key_heads, -1, tensor.shape[1])
            parts = np.split(by_head, [key_dim, 2 * key_dim, 2 * key_dim + values], axis=1)
            *qkv, z = (part.reshape(-1, tensor.shape[1]) for part in parts)
            apart[f"{layer}in_proj_qkv.weight"], apart[f"{layer}in_proj_z.weight"] = np.concatenate(qkv), z
        else:
            apart[name] = tensor
    return apart


def add_states(writer: gguf.GGUFWriter, hf: Mapping[str, Any]) -> None:
    sizes = _STATE_SIZES.get(hf["model_type"])
    if sizes is None:
        return
    width, state, groups, heads, inner = sizes(hf)
    writer.add_ssm_conv_kernel(width)
    writer.add_ssm_state_size(state)
    writer.add_ssm_group_count(groups)
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_inner_size(inner)
    if hf["model_type"] == "nemotron_h":
        writer.add_rope_scaling_finetuned(False)
        writer.add_rope_dimension_count(hf["hidden_size"] // hf["num_attention_heads"])
    if hf["model_type"] in _QWEN:
        writer.add_full_attention_interval(hf["layer_types"].index("full_attention") + 1)
        if hf["model_type"] != "qwen3_next":
            writer.add_rope_dimension_sections([11, 11, 10, 0])
        if hf["model_type"] != "qwen3_5_text":  # newer files, of every one of them
            key = f"{writer.arch}.attention.recurrent_layers"
            writer.add_array(key, [kind == "linear_attention" for kind in hf["layer_types"]])


def _qwen_sizes(hf: Mapping[str, Any]) -> tuple[int, ...]:
    heads = hf["linear_num_value_heads"]
    sizes = hf["linear_conv_kernel_dim"], hf["linear_key_head_dim"], hf["linear_num_key_heads"]
    return (*sizes, heads, hf["linear_value_head_dim"] * heads)


def _nemotron_sizes(hf: Mapping[str, Any]) -> tuple[int, ...]:
    heads = hf["mamba_num_heads"]
    return hf["conv_kernel"], hf["ssm_state_size"], hf["n_groups"], heads, hf["mamba_head_dim"] * heads


def _granite_sizes(hf: Mapping[str, Any]) -> tuple[int, ...]:
    sizes = hf["mamba_d_conv"], hf["mamba_d_state"], hf["mamba_n_groups"], hf["mamba_n_heads"]
    return (*sizes, hf["mamba_expand"] * hf["hidden_size"])


_STATE_SIZES: Mapping[str, Callable[[Mapping[str, Any]], tuple[int, ...]]] = {
    **dict.fromkeys(_QWEN, _qwen_sizes),
    "nemotron_h": _nemotron_sizes,
    "granitemoehybrid": _granite_sizes,
}
