"""Random adapters of a tiny model, and the model that each of them makes of it: Hugging Face's, with merged weights."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nanovllm.lora.request import LoRARequest
from tests.tiny_models import load_hugging_face

EVERYTHING = r".*_proj|embed_tokens|lm_head"
Tensors = dict[str, Tensor]


def make_tensors(hf: Any, modules: str = EVERYTHING, rank: int = 4, seed: int = 0, biases: bool = False) -> Tensors:
    """By PEFT's names. modules: a pattern for the last part of their names."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    for name, module in hf.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding) or not re.fullmatch(modules, name.rpartition(".")[2]):
            continue
        (outputs, inputs), path = module.weight.shape, f"base_model.model.{name}"
        if isinstance(module, nn.Embedding):
            tensors[f"{path}.lora_embedding_A"] = noise(rank, outputs)
            tensors[f"{path}.lora_embedding_B"] = noise(inputs, rank)
            continue
        tensors[f"{path}.lora_A.weight"] = noise(rank, inputs)
        tensors[f"{path}.lora_B.weight"] = noise(outputs, rank)
        if biases:
            tensors[f"{path}.lora_B.bias"] = noise(outputs)
            if module.bias is not None:
                tensors[f"{path}.base_layer.bias"] = noise(outputs)
    assert tensors, "the pattern names nothing"
    return tensors


@torch.no_grad()
def merged(folder: Path, tensors: Mapping[str, Tensor], scale: float) -> Any:
    """Hugging Face's model with W + scale * B A in the place of each W, and biases likewise."""
    hf = load_hugging_face(folder)
    if hf.config.tie_word_embeddings and any("embed" in name or "lm_head" in name for name in tensors):
        hf.lm_head.weight = nn.Parameter(hf.lm_head.weight.clone())
    modules = dict(hf.named_modules())
    for name, tensor in tensors.items():
        path, _, kind = name.removeprefix("base_model.model.").partition(".lora_")
        if kind in ("A.weight", "embedding_A"):
            b = tensors[name.replace("_A", "_B")]
            change = scale * b @ tensor
            modules[path].weight += change if kind == "A.weight" else change.T
        elif kind == "B.bias":
            change = scale * tensor
            if modules[path].bias is None:
                modules[path].bias = nn.Parameter(torch.zeros_like(change))
            modules[path].bias += change
        elif name.endswith("base_layer.bias"):
            path = path.removesuffix(".base_layer.bias")
            modules[path].bias += tensor - load_hugging_face(folder).get_parameter(f"{path}.bias")
    return hf


def request(name: str, tensors: Mapping[str, Tensor], rank: int = 4, alpha: float = 8, **config: Any) -> LoRARequest:
    return LoRARequest(name, tensors, {"r": rank, "lora_alpha": alpha, **config})


def save(folder: Path, tensors: Tensors, rank: int = 4, alpha: float = 8, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def logprobs_of(hf: Any, token_ids: Sequence[int]) -> Tensor:
    """Of each token but the first, after those before it."""
    logits = hf(torch.tensor([list(token_ids)])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
