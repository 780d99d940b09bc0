"""Where a layer's norms are, by `ModelConfig.norms`, and what checkpoints call them:

    before    input_layernorm  attention                                 post_attention_layernorm   MLP
    after                      attention  post_attention_layernorm                                  MLP  post_feedforward_layernorm
    both      input_layernorm  attention  post_attention_layernorm       pre_feedforward_layernorm  MLP  post_feedforward_layernorm
    shared    input_layernorm  attention and MLP side by side

Owns the names only. Invariant: the places are the attributes of `llama.DecoderLayer`.
"""  # noqa: E501

from collections.abc import Mapping

from nanovllm.model_config import ModelConfig

PLACES = ("before_attention", "after_attention", "before_mlp", "after_mlp")

_NAMES: Mapping[str, tuple[str | None, ...]] = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": (
        *("input_layernorm", "post_attention_layernorm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    "shared": ("input_layernorm", None, None, None),
}


def norm_names(config: ModelConfig) -> dict[str, str]:
    """The norms of a layer: its name in the checkpoint by place. `ModelConfig.norm_names` says what differs."""
    names = zip(PLACES, _NAMES[config.norms], strict=True)
    return {place: config.norm_names.get(place, name) for place, name in names if name is not None}
