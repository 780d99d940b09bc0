"""Small GGUF files for tests, written with the `gguf` package as llama.cpp's converter writes them."""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

from tests.gguf_families import (
    PACKED_BYTES,
    add_gemma4,
    add_gpt_oss,
    add_kimi,
    gemma4_name,
    with_gemma4,
    with_gpt_oss,
    with_kimi,
    with_latents_split,
)
from tests.gguf_states import add_states, with_states

Quantization = gguf.GGMLQuantizationType
Quantized = tuple[np.ndarray, Quantization]

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, LAYERS, VOCABULARY = 64, 4, 2, 16, 96, 2, 32

_HF_OF_GGUF = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def tiny_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """GGUF name -> float32 array, rows as Hugging Face has them."""
    random = np.random.default_rng(seed)
    shapes = {
        "attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "ffn_gate": (INTERMEDIATE, HIDDEN),
        "ffn_up": (INTERMEDIATE, HIDDEN),
        "ffn_down": (HIDDEN, INTERMEDIATE),
        "attn_norm": (HIDDEN,),
        "ffn_norm": (HIDDEN,),
    }
    tensors = {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,)}
    tensors |= {f"blk.{layer}.{name}.weight": shape for layer in range(LAYERS) for name, shape in shapes.items()}
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in tensors.items()}


def hf_name(name: str) -> str:
    """Hugging Face name of a tensor of `tiny_tensors`."""
    if name in ("token_embd.weight", "output_norm.weight", "output.weight"):
        return {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}[
            name[:-7]
        ] + ".weight"
    _, layer, module, kind = name.split(".")
    return f"model.layers.{layer}.{_HF_OF_GGUF[module]}.{kind}"


def permute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from halves to interleaved pairs: what llama.cpp's converter does to queries and keys."""
    order = []
    head_dim = len(rows) // num_heads
    for head in range(num_heads):
        for pair in range(head_dim // 2):
            order += [head * head_dim + pair, head * head_dim + head_dim // 2 + pair]
    return rows[order]


def metadata(architecture: str, **extra: Any) -> dict[str, Any]:
    """Metadata of `tiny_tensors`; a value of None in `extra` removes a key, "." is written "__"."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": INTERMEDIATE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    values |= {key.replace("__", "."): value for key, value in extra.items()}
    return {f"{architecture}.{key}": value for key, value in values.items() if value is not None}


def write_gguf(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    quantization: Quantization | None = None,
) -> Path:
    """Write a file, matrices quantized as `quantization`, queries and keys of the llama architecture permuted."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        for module, num_heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
            if architecture == "llama" and f".{module}." in name:
                tensor = permute(tensor, num_heads)
        if quantization is not None and tensor.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(tensor, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_ARCHITECTURE_OF_HF = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "MixtralForCausalLM": "llama",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
    "GraniteForCausalLM": "granite",
    "Olmo2ForCausalLM": "olmo2",
    "OlmoeForCausalLM": "olmoe",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "Glm4MoeForCausalLM": "glm4moe",
    "Dots1ForCausalLM": "dots1",
    "DeepseekV2ForCausalLM": "deepseek2",
    "DeepseekV3ForCausalLM": "deepseek2",
    "Ernie4_5_MoeForCausalLM": "ernie4_5-moe",
    "HunYuanMoEV1ForCausalLM": "hunyuan-moe",
    "GraniteMoeForCausalLM": "granitemoe",
    "GraniteMoeSharedForCausalLM": "granitemoe",
    "SmolLM3ForCausalLM": "smollm3",
    "GemmaForCausalLM": "gemma",
    "SeedOssForCausalLM": "seed_oss",
    "Olmo3ForCausalLM": "olmo2",
    "Exaone4ForCausalLM": "exaone4",
    "GlmForCausalLM": "chatglm",
    "Glm4ForCausalLM": "glm4",
    "Ernie4_5ForCausalLM": "ernie4_5",
    "ArceeForCausalLM": "arcee",
    "HunYuanDenseV1ForCausalLM": "hunyuan-dense",
    "Starcoder2ForCausalLM": "starcoder2",
    "CohereForCausalLM": "command-r",
    "Cohere2ForCausalLM": "cohere2",
    "ApertusForCausalLM": "apertus",
    "Ministral3ForCausalLM": "mistral3",
    "GraniteMoeHybridForCausalLM": "granite",
    "Lfm2ForCausalLM": "lfm2",
    "Lfm2MoeForCausalLM": "lfm2moe",
    "Qwen3_5ForCausalLM": "qwen35",
    "Qwen3_5MoeForCausalLM": "qwen35moe",
    "Qwen3NextForCausalLM": "qwen3next",
    "NemotronHForCausalLM": "nemotron_h",
    "GptOssForCausalLM": "gpt-oss",
    "KimiLinearForCausalLM": "kimi-linear",
    "Gemma4ForCausalLM": "gemma4",
    "Glm4MoeLiteForCausalLM": "deepseek2",
}
_GATE_UP = ("ffn_gate_exps", "ffn_up_exps")
_PERMUTED = (
    "llama",
    "granite",
    "granitehybrid",
    "nemotron_h",
    "nemotron_h_moe",
    "granitemoe",
    "smollm3",
    "arcee",
    "mistral3",
)
_ONE_MORE = ("gemma", "gemma2", "gemma3", "qwen35", "qwen35moe", "qwen3next")  # is added to their norms
_ARCH = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}


def convert(
    folder: Path,
    path: Path,
    quantize: Callable[[str, np.ndarray], Quantized] | None = None,
    unpacked: Collection[str] = (),
    is_fused: bool = False,
) -> Path:
    """Write the safetensors checkpoint of `folder` as llama.cpp's converter does; names come from the gguf package.

    quantize: (GGUF name, matrix of the checkpoint) -> its blocks and their kind. unpacked: of tensors that are in MXFP4
    in the checkpoint, and not in the file. is_fused: queries, keys and values in one, and gate and up of experts.
    """
    hf = json.loads((folder / "config.json").read_text())
    architecture = _ARCHITECTURE_OF_HF[hf["architectures"][0]]
    if architecture == "nemotron_h":  # as released with experts, or without
        if "moe" in hf["layers_block_type"]:
            architecture = "nemotron_h_moe"
        else:
            hf = {name: value for name, value in hf.items() if "expert" not in name and "moe" not in name}
        hf |= {"num_hidden_layers": len(hf["layers_block_type"]), "rms_norm_eps": hf["layer_norm_epsilon"]}
    if architecture == "granite" and "linear_attention" in hf.get("layer_types", ()):
        architecture = "granitehybrid"
    if "mlp_layer_types" in hf:  # released checkpoints count the dense ones
        hf["first_k_dense_replace"] = hf["mlp_layer_types"].index("sparse")
    names = gguf.get_tensor_name_map(_ARCH[architecture], hf["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, architecture)
    tensors = _without_numbers(writer, load_file(folder / "model.safetensors"))
    if hf["model_type"] == "granitemoehybrid" and not hf["num_local_experts"]:
        tensors = _with_split_shared_mlp(tensors)
    if "kv_lora_rank" in hf:
        tensors = with_latents_split(tensors, hf)
    if architecture == "gpt-oss":
        tensors = with_gpt_oss(tensors)
    if architecture == "gemma4":
        tensors = with_gemma4(tensors)
    if architecture == "kimi-linear":
        tensors = with_kimi(tensors)
    else:
        tensors = with_states(tensors, hf)
    named: dict[str, np.ndarray] = {}
    for hf_tensor_name, tensor in _with_split_halves(_with_stacked_experts(tensors)).items():
        name = names.get_name(hf_tensor_name, (".weight", ".bias")) or gemma4_name(hf_tensor_name)
        assert name is not None, hf_tensor_name
        for module, num_heads in (("attn_q", "num_attention_heads"), ("attn_k", "num_key_value_heads")):
            if architecture in _PERMUTED and f".{module}." in name:
                tensor = permute(tensor, hf[num_heads])
        if name.endswith("shortconv.conv.weight"):
            tensor = tensor[:, 0]
        named[name] = tensor
    for name, tensor in (_fused(named) if is_fused else named).items():
        is_norm = name.endswith("norm.weight") and "ssm_norm" not in name
        if is_norm and architecture in _ONE_MORE:
            tensor = tensor + 1
        if name in unpacked:
            tensor = gguf.quants.dequantize(tensor, Quantization.MXFP4)
        if tensor.dtype == PACKED_BYTES:
            writer.add_tensor(name, tensor, raw_dtype=Quantization.MXFP4)
        elif (
            quantize is not None
            and tensor.ndim > 1
            and not re.search("ffn_gate_inp|exp_probs_b|shortconv.conv|bias$", name)
        ):
            blocks, kind = quantize(name, tensor)
            writer.add_tensor(name, blocks, raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    _add_metadata(writer, hf)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _fused(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    fused = dict(tensors)
    for name in tensors:
        for parts, whole, axis in ((("attn_q", "attn_k", "attn_v"), "attn_qkv", 0), (_GATE_UP, "ffn_gate_up_exps", 1)):
            if f".{parts[0]}." in name:
                names = [name.replace(f".{parts[0]}.", f".{part}.") for part in parts]
                together = np.concatenate([fused.pop(one) for one in names], axis)
                fused[name.replace(f".{parts[0]}.", f".{whole}.")] = together
    return fused


def _with_stacked_experts(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    stacked = {name: tensor for name, tensor in tensors.items() if not re.search(r"\.experts\.\d", name)}
    for name in tensors:
        if match := re.fullmatch(r"(.+\.experts)\.0\.(.+)", name):
            count = sum(other.startswith(match[1]) and other.endswith(match[2]) for other in tensors)
            stacked[f"{match[1]}.{match[2]}"] = np.stack([tensors[f"{match[1]}.{i}.{match[2]}"] for i in range(count)])
    return stacked


def _with_split_halves(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Granite keeps gate and up of its experts in one matrix; and the bias of a router ends as other biases do."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("input_linear.weight"):
            block = name.removesuffix("input_linear.weight")
            as_others = block.replace("block_sparse_moe", "mlp.experts").replace("shared_mlp", "mlp.shared_expert")
            for part, half in zip(("gate_proj", "up_proj"), np.split(tensor, 2, axis=-2), strict=True):
                result[f"{as_others}{part}.weight"] = half
        else:
            result[name.replace("e_score_correction_bias", "e_score_correction.bias")] = tensor
    return result


def _add_mixture(writer: gguf.GGUFWriter, hf: Mapping[str, Any]) -> None:
    if "num_experts_per_tok" in hf:
        count = hf.get("num_experts") or hf.get("n_routed_experts") or hf["num_local_experts"]
        writer.add_expert_count(count)
        writer.add_expert_used_count(hf["num_experts_per_tok"])
    if "moe_intermediate_size" in hf:
        writer.add_expert_feed_forward_length(hf["moe_intermediate_size"])
    for name in ("shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size"):
        if name in hf:
            writer.add_expert_shared_feed_forward_length(hf[name])
    if hf["model_type"] == "nemotron_h" and "n_routed_experts" in hf:
        writer.add_expert_shared_count(hf["n_shared_experts"])
        writer.add_expert_weights_scale(hf["routed_scaling_factor"])
        writer.add_expert_weights_norm(hf["norm_topk_prob"])
        writer.add_expert_group_count(hf["n_group"])
        writer.add_expert_group_used_count(hf["topk_group"])
    elif "n_routed_experts" in hf:
        is_v2 = hf["model_type"] == "deepseek_v2"
        functions = gguf.ExpertGatingFuncType
        writer.add_expert_gating_func(functions.SOFTMAX if is_v2 else functions.SIGMOID)
        writer.add_expert_shared_count(hf["n_shared_experts"])
        writer.add_leading_dense_block_count(hf["first_k_dense_replace"])
        writer.add_expert_weights_scale(hf["routed_scaling_factor"])
        writer.add_expert_weights_norm(hf["norm_topk_prob"])
        writer.add_expert_group_count(hf["n_group"] or 1)
        writer.add_expert_group_used_count(hf["topk_group"] or 1)
    if hf["model_type"] == "hunyuan_v1_moe":
        writer.add_expert_count(hf["num_experts"])
        writer.add_expert_used_count(hf["moe_topk"])
        writer.add_expert_shared_count(1)
        writer.add_expert_feed_forward_length(hf["intermediate_size"])
        writer.add_expert_shared_feed_forward_length(hf["intermediate_size"])
    if hf["model_type"] == "ernie4_5_moe":
        writer.add_expert_count(hf["moe_num_experts"])
        writer.add_expert_used_count(hf["moe_k"])
        writer.add_interleave_moe_layer_step(hf["moe_layer_interval"])
        writer.add_leading_dense_block_count(hf["moe_layer_start_index"])
        writer.add_expert_shared_count(hf["moe_num_shared_experts"])
        writer.add_expert_shared_feed_forward_length(hf["intermediate_size"] // hf["num_key_value_heads"])


def _add_latents(writer: gguf.GGUFWriter, hf: Mapping[str, Any]) -> None:
    rope_dim, rank = hf["qk_rope_head_dim"], hf["kv_lora_rank"]
    if hf.get("q_lora_rank") is not None:
        writer.add_q_lora_rank(hf["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_rope_dimension_count(rope_dim)
    lengths = hf["qk_nope_head_dim"] + rope_dim, hf["v_head_dim"]
    if hf["model_type"] != "deepseek_v2":
        writer.add_key_length_mla(lengths[0])
        writer.add_value_length_mla(lengths[1])
        lengths = rank + rope_dim, rank
    writer.add_key_length(lengths[0])
    writer.add_value_length(lengths[1])
    if "mscale_all_dim" in hf.get("rope_parameters", ()):
        writer.add_rope_scaling_yarn_log_mul(0.1 * hf["rope_parameters"]["mscale_all_dim"])


def _with_split_shared_mlp(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Granite 4's only MLP by the names of Granite 3's."""
    split = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.partition(".shared_mlp.")
        if rest == "input_linear.weight":
            split[f"{layer}.mlp.gate_proj.weight"], split[f"{layer}.mlp.up_proj.weight"] = np.split(tensor, 2)
        else:
            split[f"{layer}.mlp.down_proj.weight" if rest else name] = tensor
    return split


def _without_numbers(writer: gguf.GGUFWriter, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """xIELU's four numbers a layer go into the metadata."""
    for number in ("alpha_p", "alpha_n", "beta", "eps"):
        found = {name: tensor for name, tensor in tensors.items() if name.endswith(f".act_fn.{number}")}
        if found:
            by_layer = sorted(found, key=lambda name: int(name.split(".")[2]))
            getattr(writer, f"add_xielu_{number}")([found[name].item() for name in by_layer])
    return {name: tensor for name, tensor in tensors.items() if ".act_fn." not in name}


def _add_metadata(writer: gguf.GGUFWriter, hf: Mapping[str, Any]) -> None:
    ropes = hf.get("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})
    rope = ropes.get("full_attention", ropes)
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    writer.add_vocab_size(hf["vocab_size"])
    writer.add_context_length(hf.get("max_position_embeddings") or hf["model_max_length"])
    writer.add_embedding_length(hf["hidden_size"])
    num_more = hf.get("num_nextn_predict_layers", 0)
    writer.add_block_count(hf["num_hidden_layers"] + num_more)
    if num_more:
        writer.add_nextn_predict_layers(num_more)
        writer.add_tensor(f"blk.{hf['num_hidden_layers']}.nextn.enorm.weight", np.ones(8, np.float32))
    widths = hf["intermediate_size"]
    if hf["model_type"] == "nemotron_h":
        width = hf.get("moe_intermediate_size", widths)
        widths = [width if kind in ("mlp", "moe") else 0 for kind in hf["layers_block_type"]] + [width] * num_more
    writer.add_feed_forward_length(widths)
    writer.add_head_count(hf["num_attention_heads"])
    kv_heads = hf["num_key_value_heads"]
    if "kv_lora_rank" in hf and hf["model_type"] != "deepseek_v2":
        kv_heads = 1  # of what is cached
    if hf["model_type"] == "kimi_linear":
        kv_heads = [0 if layer_type == "linear_attention" else 1 for layer_type in hf["layer_types"]]
    if hf["model_type"] in ("lfm2", "lfm2_moe"):
        writer.add_shortconv_l_cache(hf["conv_L_cache"])
        kv_heads = [0 if layer_type == "conv" else kv_heads for layer_type in hf["layer_types"]]
    if hf["model_type"] == "lfm2_moe":
        writer.add_leading_dense_block_count(hf["num_dense_layers"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if hf["model_type"] == "nemotron_h":
        with_heads = [kind == "full_attention" for kind in hf["layers_block_type"]] + [True] * num_more
        kv_heads = [kv_heads if has_heads else 0 for has_heads in with_heads]
    if hf["model_type"] == "granitemoehybrid" and "linear_attention" in hf["layer_types"]:
        kv_heads = [0 if layer_type == "linear_attention" else kv_heads for layer_type in hf["layer_types"]]
    add_states(writer, hf)
    writer.add_head_count_kv(kv_heads)
    if (layer_norm_eps := hf.get("layer_norm_eps") or hf.get("norm_epsilon")) is not None:
        writer.add_layer_norm_eps(layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(hf.get("rms_norm_eps") or hf["norm_eps"])
    if hf["model_type"] == "nemotron_h":
        writer.add_layer_norm_eps(hf["layer_norm_epsilon"])
    if "kv_lora_rank" in hf:
        _add_latents(writer, hf)
    else:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    alpha = rope.get("alpha") or 1.0
    writer.add_rope_freq_base(rope["rope_theta"] * alpha ** (head_dim / (head_dim - 2)))
    if alpha != 1.0 or hf["model_type"] == "gemma4_text":
        rope = {"rope_type": "default"}
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rope["rope_theta"], head_dim, rope["factor"]))
    elif rope["rope_type"] == "longrope":
        for name in ("short", "long"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], np.float32))
        original = hf["original_max_position_embeddings"]
        factor = hf["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(factor) / math.log(original)))
        writer.add_rope_scaling_orig_ctx_len(original)
    elif rope["rope_type"] != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    _add_mixture(writer, hf)
    if hf["model_type"] == "gpt_oss":
        add_gpt_oss(writer, hf)
    if hf["model_type"] == "kimi_linear":
        add_kimi(writer, hf)
    if hf["model_type"] == "gemma4_text":
        add_gemma4(writer, hf)
    if "query_pre_attn_scalar" in hf:
        writer.add_sliding_window(hf["sliding_window"])
        if hf["final_logit_softcapping"]:
            writer.add_final_logit_softcapping(hf["final_logit_softcapping"])
        if hf.get("attn_logit_softcapping"):
            writer.add_attn_logit_softcapping(hf["attn_logit_softcapping"])
    if hf["model_type"] == "phi3":
        writer.add_sliding_window(hf["sliding_window"] or 0)
    if "partial_rotary_factor" in rope:
        writer.add_rope_dimension_count(int(head_dim * rope["partial_rotary_factor"]))
    if hf["model_type"] in ("olmo3", "exaone4", "cohere2") and hf["sliding_window"]:
        writer.add_sliding_window(hf["sliding_window"])
        if hf["model_type"] != "cohere2":
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in hf["layer_types"]])
    if "logit_scale" in hf:
        writer.add_logit_scale(hf["logit_scale"])
    if "llama_4_scaling_beta" in rope:
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
    elif rope["rope_type"] == "yarn" and "attention_factor" in rope:
        writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
    if hf["model_type"] == "granitemoehybrid":
        writer.add_rope_scaling_finetuned(hf["position_embedding_type"] == "rope")
    if "residual_multiplier" in hf:
        writer.add_attention_scale(hf["attention_multiplier"])
        writer.add_embedding_scale(hf["embedding_multiplier"])
        writer.add_residual_scale(hf["residual_multiplier"])
        writer.add_logit_scale(hf["logits_scaling"])


def random_blocks(kind: Quantization, shape: tuple[int, ...], seed: int, std: float) -> np.ndarray:
    """Random blocks of a quantization, whatever can be written or not, whose numbers have about this deviation."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(seed).integers(
        0, 256, (*shape[:-1], shape[-1] // block_size, block_bytes), dtype=np.uint8
    )

    def scaled(scale: float) -> np.ndarray:
        for place in _SCALES[kind.name]:
            rows[..., place : place + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        return rows.reshape(*shape[:-1], -1)

    return scaled(std / gguf.quants.dequantize(scaled(1.0), kind).std())


# Where a block has its scale, and its minimum if it has one: float16 each.
_SCALES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)},
}


def llama3_divisors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """As llama.cpp's converter computes them, one at a time."""
    divisors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / head_dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


def byte_level_keys(pre: str = "gpt-2", **extra: Any) -> dict[str, Any]:
    """Tokenizer metadata of a byte-level vocabulary: 256 bytes, six merges, BOS 262, EOS 263, user-defined 264."""
    from nanovllm.token_bytes import _BYTE_OF_CHARACTER

    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
    tokens = [*_BYTE_OF_CHARACTER, *(merge.replace(" ", "") for merge in merges), "<bos>", "<eos>", "<think>"]
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [1] * 262 + [3, 3, 4],
        "merges": merges,
        "bos_token_id": 262,
        "eos_token_id": 263,
        "padding_token_id": 263,
    }
    keys |= extra
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def sentencepiece_keys(**extra: Any) -> dict[str, Any]:
    """Tokenizer metadata of a sentencepiece vocabulary: <unk>, <s>, </s>, 256 bytes, some pieces with scores."""
    pieces = ["▁", "a", "b", "c", "ab", "▁ab", "abc", "▁abc", "é"]
    keys = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces],
        "scores": [0.0] * 259 + [-float(index) for index in range(len(pieces))],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    keys |= extra
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
