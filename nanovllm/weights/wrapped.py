"""The text model inside a multimodal checkpoint: its config, and its tensors by the names that it has alone.

Owns which parts of such a checkpoint are left out, by name. Invariant: what is left out is said, and a tensor of no
known part is handed on, so that the loader refuses it.
"""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# As transformers 5 names the text model's tensors, and as it did before.
_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
_OTHER_PARTS = (
    "vision_tower",
    "vision_model",
    "visual",
    "multi_modal_projector",
    "audio_tower",
    "embed_vision",
    "embed_audio",
)
# Said of the whole, and of the text model if the whole does not say it.
_OF_THE_WHOLE = ("dtype", "torch_dtype", "tie_word_embeddings", "eos_token_id", "bos_token_id", "pad_token_id")
_LISTS_OF_LAYERS = ("ignore", "ignored_layers", "modules_to_not_convert")  # in a quantization_config
# Positions of text are the same in all sections, so that these change nothing without images.
_ROTATION_OF_IMAGES = ("mrope_section", "mrope_interleaved")


def text_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The config.json of the text model of a multimodal one; any other is returned as it is.

    `architectures` stays that of the whole: it says which text model it is. Raises ValueError.
    """
    if "text_config" not in config:
        return dict(config)
    text = config["text_config"]
    if not isinstance(text, dict):
        raise ValueError(f"{path / 'config.json'}: text_config must be an object, got {text!r}")
    whole = {name: config[name] for name in _OF_THE_WHOLE if config.get(name) is not None}
    merged = {**text, **whole, "architectures": config.get("architectures")}
    if isinstance(config.get("quantization_config"), dict):
        merged["quantization_config"] = _of_the_text(config["quantization_config"])
    for field in ("rope_scaling", "rope_parameters"):
        if isinstance(merged.get(field), dict):
            merged[field] = {name: value for name, value in merged[field].items() if name not in _ROTATION_OF_IMAGES}
    return merged


def _of_the_text(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Layers that are listed as not quantized, by their names in the text model; those of other parts stay listed."""
    renamed = {
        key: [text_name(name) or name for name in names]
        for key, names in quantization.items()
        if key in _LISTS_OF_LAYERS and isinstance(names, list) and all(isinstance(name, str) for name in names)
    }
    return {**quantization, **renamed}


def text_name(name: str) -> str | None:
    """What a tensor is called in the text model alone; None for one of another part."""
    parts = name.split(".", 2)
    if parts[0] in _OTHER_PARTS or (parts[0] == "model" and len(parts) > 1 and parts[1] in _OTHER_PARTS):
        return None
    for prefix, own in _PREFIXES.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name


def warn_of_other_parts(names: Iterable[str], path: Path) -> None:
    left_out = [name for name in names if text_name(name) is None]
    if left_out:
        parts = sorted({part for name in left_out for part in name.split(".", 2)[:2] if part in _OTHER_PARTS})
        warnings.warn(
            f"{path}: only the text model is read; {len(left_out)} tensors of {', '.join(parts)} are left out",
            stacklevel=2,
        )
