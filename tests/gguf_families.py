"""What llama.cpp's converter does to tensors of families that are laid out in a way of their own."""

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

Tensors = dict[str, np.ndarray]
PACKED_BYTES = np.dtype(np.uint8)  # of a tensor that is in MXFP4's blocks already


# --- gpt-oss -----------------------------------------------------------------------


def with_gpt_oss(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Gate and up of experts apart, and outputs as rows; MXFP4 with the exponent before its codes."""
    converted: Tensors = {}
    for name, tensor in tensors.items():
        layer, _, part = name.partition(".experts.")
        if part.endswith("_blocks"):
            tensor = _mxfp4(tensor, tensors[name.replace("_blocks", "_scales")])
        elif part in ("gate_up_proj", "down_proj"):
            tensor = tensor.swapaxes(1, 2)
        ending = "bias" if part.endswith("_bias") else "weight"
        if part.startswith("gate_up_proj") and not part.endswith("_scales"):
            for first, projection in enumerate(("gate", "up")):
                half = np.ascontiguousarray(tensor[:, first::2])
                converted[f"{layer}.experts.{projection}_proj.{ending}"] = half
        elif part.startswith("down_proj") and not part.endswith("_scales"):
            converted[f"{layer}.experts.down_proj.{ending}"] = np.ascontiguousarray(tensor)
        elif not part:
            converted[f"{name}.weight" if name.endswith("sinks") else name] = tensor
    return converted


def _mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    inputs = np.stack((blocks & 15, blocks >> 4), axis=-1).reshape(*blocks.shape[:-1], 32)
    codes = inputs[..., :16] | inputs[..., 16:] << 4
    return np.concatenate((scales[..., None], codes), axis=-1).reshape(*blocks.shape[:2], -1)


def add_gpt_oss(writer: gguf.GGUFWriter, hf: Mapping[str, Any]) -> None:
    writer.add_sliding_window(hf["sliding_window"])
    writer.add_expert_feed_forward_length(hf["intermediate_size"])


# --- latent attention --------------------------------------------------------------


def with_latents_split(tensors: Mapping[str, np.ndarray], hf: Mapping[str, Any]) -> Tensors:
    """Of V3 as since 2025: what makes keys, turned round, and what makes values, head by head. Of V2 as before."""
    if hf["model_type"] == "deepseek_v2":
        return dict(tensors)
    split = {}
    for name, tensor in tensors.items():
        if name.endswith("kv_b_proj.weight"):
            heads = tensor.reshape(hf["num_attention_heads"], -1, tensor.shape[1])
            k_b, v_b = np.split(heads, [hf["qk_nope_head_dim"]], axis=1)
            split[name.replace("kv_b_proj", "k_b_proj")] = np.ascontiguousarray(k_b.swapaxes(1, 2))
            split[name.replace("kv_b_proj", "v_b_proj")] = np.ascontiguousarray(v_b)
        else:
            split[name] = tensor
    return split


def with_kimi(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """From the names of released checkpoints; transformers writes an MLP without experts among those with them."""
    converted = {}
    usual = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for name, tensor in tensors.items():
        block, _, last = name.removesuffix(".weight").rpartition(".")
        if block.endswith("block_sparse_moe") and last.endswith("_proj"):
            name = name.replace("block_sparse_moe", "mlp")
        elif ".experts." in name:
            name = f"{block}.{usual[last]}.weight".replace("block_sparse_moe", "mlp")
        elif last.endswith("_conv1d"):
            tensor = tensor.reshape(1, len(tensor), 1, -1)
        elif last == "A_log":
            tensor = -np.exp(tensor)
        converted[name.replace(".dt_bias", ".dt_proj.bias")] = tensor
    return converted


def add_kimi(writer: gguf.GGUFWriter, hf: Mapping[str, Any]) -> None:
    writer.add_ssm_conv_kernel(hf["linear_conv_kernel_dim"])
    writer.add_kda_head_dim(hf["linear_head_dim"])
    writer.add_expert_count(hf["num_experts"])
    writer.add_expert_used_count(hf["num_experts_per_token"])
    writer.add_expert_shared_count(hf["num_shared_experts"])
    writer.add_expert_feed_forward_length(hf["moe_intermediate_size"])
    writer.add_leading_dense_block_count(hf["first_k_dense_replace"])
    writer.add_expert_weights_scale(hf["routed_scaling_factor"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_group_used_count(hf["topk_group"])


# --- Gemma 4 -----------------------------------------------------------------------


def with_gemma4(tensors: Mapping[str, np.ndarray]) -> Tensors:
    converted = {}
    for name, tensor in tensors.items():
        if name.endswith(("layer_scalar", ".experts.gate_up_proj", ".experts.down_proj")):
            name += ".weight"
        converted[name] = tensor
    return converted


def gemma4_name(hf_name: str) -> str | None:
    """Of the two scales that stand beside matrices."""
    layer = hf_name.split(".")[2]
    scales = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}
    return next((f"blk.{layer}.{name}" for ending, name in scales.items() if hf_name.endswith(ending)), None)


def add_gemma4(writer: gguf.GGUFWriter, hf: Mapping[str, Any]) -> None:
    windows = [kind == "sliding_attention" for kind in hf["layer_types"]]
    num_layers, num_shared = len(windows), hf["num_kv_shared_layers"]
    full = next(iter(hf["per_layer_config"].values()))
    writer.add_sliding_window(hf["sliding_window"])
    writer.add_sliding_window_pattern(windows)
    writer.add_shared_kv_layers(num_shared)
    writer.add_embedding_length_per_layer_input(hf["hidden_size_per_layer_input"])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(full["head_dim"])
    for add in (writer.add_key_length_swa, writer.add_value_length_swa, writer.add_rope_dimension_count_swa):
        add(hf["head_dim"])
    width = hf["intermediate_size"]
    if hf["use_double_wide_mlp"]:
        widths = [width * (2 if layer >= num_layers - num_shared else 1) for layer in range(num_layers)]
        writer.add_feed_forward_length(widths)
    if "num_key_value_heads" in full:
        kv_heads = [hf["num_key_value_heads"] if window else full["num_key_value_heads"] for window in windows]
        writer.add_head_count_kv(kv_heads)
    writer.add_expert_feed_forward_length(hf["moe_intermediate_size"])
    if hf["enable_moe_block"]:
        writer.add_expert_count(hf["num_experts"])
        writer.add_expert_used_count(hf["top_k_experts"])
    writer.add_final_logit_softcapping(hf["final_logit_softcapping"])
    ropes = hf["rope_parameters"]
    writer.add_rope_freq_base(ropes["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    num_rotated = int(full["head_dim"] * ropes["full_attention"]["partial_rotary_factor"] / 2)
    divisors = [1.0] * num_rotated + [1e30] * (full["head_dim"] // 2 - num_rotated)
    writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
