"""Tiny quantized checkpoints, and the same models with the dense weights that the quantized ones mean."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.quantization.formats import Format
from tests.tiny_models import save_random


def save_quantized(
    folder: Path, form: Format, *, dense: Iterable[str] = (), architecture: str = "Qwen3ForCausalLM", **config: Any
) -> tuple[Path, Path]:
    """(quantized, dense), both below `folder`. dense: parts of the names of layers that stay as they are."""
    if not form.rounds_inputs:  # of 4 bits, the inputs of a layer are a multiple of 32
        config = {"intermediate_size": 64, **config}
    plain = save_random(folder / "dense", architecture, **config)
    quantized = folder / "quantized"
    quantized.mkdir()
    tensors = load_file(plain / "model.safetensors")
    stored = {}
    for name, tensor in list(tensors.items()):
        layer = name.removesuffix(".weight")
        if ".layers." in name and tensor.dim() == 2 and not any(part in name for part in dense):
            parts, meant = form.make(tensor)
            stored |= {f"{layer}.{suffix}": part for suffix, part in parts.items()}
            tensors[name] = meant.contiguous()
        else:
            stored[name] = tensor
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, quantized / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((plain / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**fields, "quantization_config": dict(form.config)}))
    return quantized, plain
