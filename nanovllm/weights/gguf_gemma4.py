"""The GGUF architecture of Gemma 4, whose layers differ in their heads, their MLPs and what they read.

Owns the meaning of its metadata and tensor names. Invariant: as in `gguf_architectures.py`. What rotates of a head in
layers that see everything, no metadata say: a tensor divides the frequencies of the others by 1e30.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nanovllm.weights.gguf_blocks import dequantize
from nanovllm.weights.gguf_metadata import GGUFMetadata
from nanovllm.weights.gguf_row import NORMS_AFTER, ROPE_FREQS, Fields, GGUFArchitecture, Join

_TOKENS_PER_LAYER = "per_layer_token_embd.weight"


def _gemma4(metadata: GGUFMetadata, common: Fields) -> Fields:
    num_layers, num_shared = common["num_hidden_layers"], metadata.integer("attention.shared_kv_layers", 0)
    has_window = metadata.by_layer("attention.sliding_window_pattern")
    if not isinstance(has_window, list) or len(has_window) != num_layers:
        raise ValueError(
            f"{metadata.file.path}: metadata gemma4.attention.sliding_window_pattern must say it of each of "
            f"{num_layers} layers"
        )
    if common["rope_scaling"] is not None:
        raise NotImplementedError(f"{metadata.file.path}: rope.scaling is not supported for gemma4")
    num_own = num_layers - num_shared  # with keys and values of their own
    full = [layer for layer in range(num_layers) if not has_window[layer]]
    head_dim = metadata.integer("attention.key_length_swa")
    metadata.expect("attention.value_length_swa", head_dim)
    metadata.expect("rope.dimension_count_swa", head_dim)
    kv_heads = _of_each(metadata, "attention.head_count_kv", num_layers)
    own = {"head_dim": head_dim, "num_key_value_heads": kv_heads[has_window.index(True) if any(has_window) else 0]}
    tensors = metadata.file.tensors
    return {
        **own,
        **_experts(metadata),
        "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "use_double_wide_mlp": _is_twice_as_wide(metadata, num_layers, num_own),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in has_window],
        "sliding_window": metadata.integer("attention.sliding_window"),
        "per_layer_config": {
            str(layer): {"head_dim": common["head_dim"], "num_key_value_heads": kv_heads[layer]} for layer in full
        },
        "attention_k_eq_v": any(f"blk.{layer}.attn_v.weight" not in tensors for layer in full if layer < num_own),
        "num_kv_shared_layers": num_shared,
        "hidden_size_per_layer_input": metadata.integer("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": tensors.get(_TOKENS_PER_LAYER, tensors["token_embd.weight"]).shape[0],
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 30.0) or None,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": _rotated_share(metadata, common["head_dim"]),
                "rope_theta": common["rope_theta"],
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": metadata.number("rope.freq_base_swa", 10000.0),
            },
        },
        "rope_theta": None,
        "rope_scaling": None,
    }


def _experts(metadata: GGUFMetadata) -> Fields:
    """Files without experts may say how wide one would be."""
    count, size = metadata.integer("expert_count", 0), metadata.integer("expert_feed_forward_length", 0)
    if not count:
        return {"enable_moe_block": False}
    top_k = metadata.integer("expert_used_count")
    return {"enable_moe_block": True, "num_experts": count, "top_k_experts": top_k, "moe_intermediate_size": size}


def _of_each(metadata: GGUFMetadata, key: str, num_layers: int) -> list[int]:
    """A number for each layer, which may be one for all."""
    numbers = metadata.by_layer(key)
    if isinstance(numbers, list) and len(numbers) == num_layers:
        return numbers
    return [metadata.integer(key)] * num_layers


def _is_twice_as_wide(metadata: GGUFMetadata, num_layers: int, num_own: int) -> bool:
    """The MLPs of layers that read the keys and values of others; those of all others are alike."""
    widths = _of_each(metadata, "feed_forward_length", num_layers)
    for factor in (1, 2):
        if widths == [widths[0] * (factor if layer >= num_own else 1) for layer in range(len(widths))]:
            return factor == 2
    raise NotImplementedError(
        f"{metadata.file.path}: gemma4.feed_forward_length = {widths} is not supported: only layers that read the keys "
        "and values of others may have another width than the first, twice that"
    )


def _rotated_share(metadata: GGUFMetadata, head_dim: int) -> float:
    info = metadata.file.tensors.get(ROPE_FREQS)
    if info is None:
        raise ValueError(f"{metadata.file.path} has no tensor {ROPE_FREQS}")
    divisors = dequantize(metadata.file.read_rows(info), info).flatten()
    num_rotated = int((divisors == 1).sum())
    expected = torch.full((head_dim // 2,), 1e30)
    expected[:num_rotated] = 1
    if not torch.equal(divisors.float(), expected):
        raise NotImplementedError(f"{metadata.file.path}: {ROPE_FREQS} must be ones, and then 1e30, for each pair")
    return 2 * num_rotated / head_dim


def _stacked(gate: Tensor, up: Tensor) -> Tensor:
    return torch.cat((gate, up), dim=1)


GEMMA4: Mapping[str, GGUFArchitecture] = {
    "gemma4": GGUFArchitecture(
        hf_class="Gemma4ForCausalLM",
        model_type="gemma4_text",
        names={
            **{**NORMS_AFTER, "ffn_norm": "pre_feedforward_layernorm"},
            **{f"post_ffw_norm_{i}": f"post_feedforward_layernorm_{i}" for i in (1, 2)},
            **{"pre_ffw_norm_2": "pre_feedforward_layernorm_2", "layer_output_scale.weight": "layer_scalar"},
            **{"inp_gate": "per_layer_input_gate", "proj": "per_layer_projection"},
            **{"post_norm": "post_per_layer_input_norm", "ffn_gate_inp": "router.proj"},
            **{"ffn_gate_inp.scale": "router.scale", "ffn_down_exps.scale": "router.per_expert_scale"},
            **{"ffn_gate_up_exps.weight": "experts.gate_up_proj", "ffn_gate_exps.weight": "experts.gate_up_proj"},
            "ffn_down_exps.weight": "experts.down_proj",
        },
        outer_names={
            _TOKENS_PER_LAYER: "model.embed_tokens_per_layer.weight",
            "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
            "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
        },
        fields=_gemma4,
        layers_differ=True,
        joins={"ffn_gate_exps": Join("ffn_up_exps", _stacked)},
    ),
}
