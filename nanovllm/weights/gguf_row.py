"""GGUFArchitecture: how one architecture of GGUF files is read, in Hugging Face's terms.

Owns the form of a row, and what rows in several files share; the rows are in `gguf_architectures.py` and
`gguf_dense.py` and `gguf_mixtures.py`. Invariant: plain data and functions of the metadata; no tensor is looked at.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from nanovllm.weights.gguf_metadata import GGUFMetadata

Fields = dict[str, Any]  # of a config.json

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FREQS = "rope_freqs.weight"  # divisors of frequencies: part of the config here, not a parameter
NORMS_AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}


class Join(NamedTuple):
    """Two tensors of a layer that are one of Hugging Face's. other: the second one. make: of both, in their order."""

    other: str
    make: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class GGUFArchitecture:
    """hf_class, model_type: as in config.json. names: of a layer's tensors, beside those that all have; one with its
    ending (.weight) is the whole name. outer_names: of tensors outside of layers that others call otherwise.

    fields: config.json fields beside those that all have. has_pairs: the rows of query and key heads are reordered.
    norm_offset: what conversion added to the weights of norms. has_partial_rotary: a part of each head may be rotated.
    has_states: layers without key/value heads keep states. has_latents: what is cached is one latent for all heads, and
    sizes of heads are told otherwise. layers_differ: in their heads and MLPs, of which `fields` says more than of the
    first layer's.
    layer_norm_eps: what config.json calls the epsilon of norms, where they are LayerNorms. numbers: tensors of one
    number that the file has in its metadata, one a layer: what follows a layer's name, by key.
    row_orders: of tensors of a layer whose rows are in another order, by place in Hugging Face's its place in the file.
    joins: by the first of two tensors, what makes one of them.
    transforms: what else makes Hugging Face's tensors of those in the file; such tensors never stay packed.
    keeps_mxfp4: experts in MXFP4 stay in it, whatever the option `quantization` says.
    """

    hf_class: str
    model_type: str
    names: Mapping[str, str] = field(default_factory=dict)
    outer_names: Mapping[str, str] = field(default_factory=dict)
    fields: Callable[[GGUFMetadata, Fields], Fields] = lambda metadata, common: {}
    has_pairs: bool = False
    norm_offset: float = 0.0
    has_partial_rotary: bool = False
    has_states: bool = False
    has_latents: bool = False
    layers_differ: bool = False
    layer_norm_eps: str | None = None
    numbers: Mapping[str, str] = field(default_factory=dict)
    row_orders: Mapping[str, Callable[[Fields], list[int]]] = field(default_factory=dict)
    joins: Mapping[str, Join] = field(default_factory=dict)
    transforms: Mapping[str, Callable[[Tensor, Fields], Tensor]] = field(default_factory=dict)
    keeps_mxfp4: bool = False

    @property
    def layer_names(self) -> Mapping[str, str]:
        return {**_LAYER_NAMES, **self.names}


def as_row(tensor: Tensor, config: Fields) -> Tensor:
    """A matrix of one row in Hugging Face's checkpoints, which here may be a vector."""
    return tensor.reshape(1, -1)


def as_convolution(tensor: Tensor, config: Fields) -> Tensor:
    """Hugging Face's have a dimension of 1 in their midst; a bias is as it is."""
    return tensor.unsqueeze(1) if tensor.dim() == 2 else tensor


def partial_rotary_factor(metadata: GGUFMetadata, common: Fields) -> float:
    return metadata.integer("rope.dimension_count", common["head_dim"]) / float(common["head_dim"])


def without_prediction_heads(metadata: GGUFMetadata, common: Fields) -> Fields:
    """Layers for further tokens are counted with the others, and left out."""
    num_more = metadata.integer("nextn_predict_layers", 0)
    return {"num_hidden_layers": common["num_hidden_layers"] - num_more, "num_nextn_predict_layers": num_more}


def granite_fields(metadata: GGUFMetadata, common: Fields, is_rotated: bool = True) -> Fields:
    """For llama.cpp, `rope.scaling.finetuned` switches the rotation of this architecture on and off."""
    metadata.expect("rope.scaling.finetuned", is_rotated)
    return {
        "attention_multiplier": metadata.number("attention.scale", 0.0) or common["head_dim"] ** -0.5,
        "embedding_multiplier": metadata.number("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": metadata.number("residual_scale", 0.0) or 1.0,
        "logits_scaling": metadata.number("logit_scale"),
    }


def layer_types(metadata: GGUFMetadata, common: Fields, period: int) -> list[str]:
    """Which layers have a window; where the file does not say so layer by layer, all but each `period`-th."""
    pattern = metadata.by_layer("attention.sliding_window_pattern")
    if not isinstance(pattern, list):
        every = pattern or period
        pattern = [(layer + 1) % every != 0 for layer in range(common["num_hidden_layers"])]
    return ["sliding_attention" if has_window else "full_attention" for has_window in pattern]
