"""read_adapter: a PEFT folder, or the tensors of one, becomes AdapterWeights.

Owns the reading of PEFT's names and of adapter_config.json. Invariant: what is returned means the same as PEFT's
adapter on the same base model; whatever is not known to is refused by name, before anything is loaded.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight  ->  model.layers.0.self_attn.q_proj.lora_A
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.lora.request import LoRARequest
from nanovllm.weights.wrapped import text_name

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# How PEFT may begin an adapter without changing the base model. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it.
_PLAIN_BEGINNINGS = ("true", "false", "gaussian", "eva", "orthogonal")
# Fields that say nothing about what an adapter computes, or say it of tensors that are looked at anyway.
_WITHOUT_MEANING = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "lora_dropout", "bias", "layers_to_transform", "layers_pattern"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "lora_bias", "megatron_config", "megatron_core"),
    *("qalora_group_size", "ensure_weight_tying", "fan_in_fan_out", "runtime_config"),
}
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"}
_REMEDIES = {
    "use_dora": "DoRA is not supported; merge it into the weights",
    "modules_to_save": "whole modules are no adapter; merge it into the weights",
    "trainable_token_indices": "trained tokens are no low-rank adapter; merge it into the weights",
    "target_parameters": "adapters of parameters, such as those of experts, are not supported; merge it",
}
_TENSOR = re.compile(
    r"(?P<module>.+?)\.(?:base_layer\.)?(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|bias|weight)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?P<suffix>\.weight|\.bias)?$"
)


class ModuleWeights(NamedTuple):
    """Of one layer, on the CPU, as the file has them.

    a [rank, inputs], b [outputs, rank]: scale * b a is added. Of a table, inputs are tokens.
    bias [outputs]: of the adapter itself, scaled as well. base_bias [outputs]: what takes the place of the layer's own
    bias. base_weight: the layer's own matrix, which the file repeats.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    bias: Tensor | None = None
    base_bias: Tensor | None = None
    base_weight: Tensor | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class AdapterWeights:
    """key: of the content, the same for the same numbers. modules: by the name of their layer in the checkpoint."""

    name: str
    key: bytes
    rank: int
    modules: Mapping[str, ModuleWeights]


def read_adapter(request: LoRARequest) -> AdapterWeights:
    """Raises FileNotFoundError, TypeError, ValueError or NotImplementedError that names adapter and reason."""
    name = request.lora_name
    if request.lora_path is None:
        assert request.tensors is not None
        config, tensors = _config_of(request.peft_config, name), request.tensors
    else:
        config, tensors = _read_folder(Path(request.lora_path).expanduser(), name)
    _check_config(config, name)
    modules = _read_modules(tensors, config, name)
    ranks = [module.a.shape[0] for module in modules.values() if module.a is not None]
    return AdapterWeights(name, _content_key(modules), max(ranks, default=1), modules)


def _config_of(peft_config: Any, name: str) -> Mapping[str, Any]:
    config = peft_config.to_dict() if hasattr(peft_config, "to_dict") else peft_config
    if not isinstance(config, Mapping):
        raise TypeError(f"adapter {name!r}: peft_config must be a mapping or a LoraConfig, got {peft_config!r}")
    return config


def _read_folder(path: Path, name: str) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    from safetensors.torch import load_file

    if not path.is_dir():
        raise FileNotFoundError(f"adapter {name!r}: there is no folder {str(path)!r}")
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"adapter {name!r}: {str(path)!r} has no {CONFIG}, so it is no PEFT adapter")
    if not (path / TENSORS).is_file():
        other = " (a pickle, adapter_model.bin, is never read)" if (path / "adapter_model.bin").exists() else ""
        raise FileNotFoundError(f"adapter {name!r}: {str(path)!r} has no {TENSORS}{other}")
    try:
        config = json.loads((path / CONFIG).read_text())
        tensors = load_file(path / TENSORS)
    except Exception as error:  # JSON's errors, and those of safetensors, which are its own
        raise ValueError(f"adapter {name!r}: {str(path)!r} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"adapter {name!r}: {CONFIG} must hold an object, got {config!r}")
    return config, tensors


def _check_config(config: Mapping[str, Any], name: str) -> None:
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type", "LORA"))
    if kind != "LORA":
        raise NotImplementedError(f"adapter {name!r}: peft_type {kind!r} is not supported; merge it into the weights")
    begun = config.get("init_lora_weights", True)
    if str(begun).lower() not in _PLAIN_BEGINNINGS:
        raise NotImplementedError(
            f"adapter {name!r}: init_lora_weights={begun!r} changes the base model as well; save it as a plain adapter "
            "(save_pretrained with path_initial_model_for_weight_conversion), or merge it"
        )
    for field, value in config.items():
        if value and field not in _WITHOUT_MEANING and field not in _READ:
            reason = _REMEDIES.get(field, "what it changes is not supported")
            raise NotImplementedError(f"adapter {name!r}: {field}={value!r}: {reason}")
    for field in ("r", "lora_alpha"):
        if not isinstance(config.get(field), (int, float)) or config[field] <= 0:
            raise ValueError(f"adapter {name!r}: {field} must be a number above 0, got {config.get(field)!r}")


def _read_modules(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> dict[str, ModuleWeights]:
    found: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        short = full_name
        for prefix in ("base_model.model.", "base_model."):
            short = short.removeprefix(prefix)
        match = _TENSOR.match(short)
        module = match and text_name(match["module"])
        if match is None or module is None:
            reason = "DoRA is not supported" if "lora_magnitude_vector" in short else "it is none of LoRA's"
            raise NotImplementedError(f"adapter {name!r}: tensor {full_name!r}: {reason}; merge it into the weights")
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"adapter {name!r}: {full_name!r} must be a tensor of floating-point numbers")
        kept = tensor.detach().to("cpu", copy=True)  # a trainer may go on changing its own
        if not torch.isfinite(kept).all():
            raise ValueError(f"adapter {name!r}: {full_name!r} holds NaN or infinity")
        found.setdefault(module, {})[_field(match["kind"], match["suffix"])] = kept
    if not found:
        raise ValueError(f"adapter {name!r} holds no tensors")
    return {module: _scaled(module, fields, config, name) for module, fields in found.items()}


def _field(kind: str, suffix: str | None) -> str:
    if kind in ("bias", "weight"):
        return f"base_{kind}"
    if kind == "lora_B" and suffix == ".bias":
        return "bias"
    return kind.rpartition("_")[2].lower()


def _scaled(module: str, fields: dict[str, Tensor], config: Mapping[str, Any], name: str) -> ModuleWeights:
    """The scale is alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski, 2023)."""
    a, b, bias, base_bias, base_weight = map(fields.get, ModuleWeights._fields[:-1])
    read = ModuleWeights(a, b, bias, base_bias, base_weight)
    if (read.a is None) != (read.b is None) or (read.b is None and read.bias is not None):
        raise ValueError(f"adapter {name!r}: of {module} it has only one of lora_A and lora_B")
    if read.a is None or read.b is None:
        return read
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    if read.a.dim() != 2 or read.b.dim() != 2 or read.a.shape[0] != read.b.shape[1]:
        shapes = tuple(read.a.shape), tuple(read.b.shape)
        raise ValueError(f"adapter {name!r}: the shapes of {module}, A {shapes[0]} and B {shapes[1]}, are of no rank")
    if read.a.shape[0] != rank:
        raise ValueError(
            f"adapter {name!r}: {module} has rank {read.a.shape[0]}, and the config says {rank}: the scale is unknown"
        )
    return read._replace(scale=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that the end of the name matches, as PEFT looks it up."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)


def _content_key(modules: Mapping[str, ModuleWeights]) -> bytes:
    digest = blake2b(digest_size=16)
    for name in sorted(modules):
        module = modules[name]
        digest.update(f"{name}/{module.scale!r}/".encode())
        for field, tensor in zip(ModuleWeights._fields, module, strict=True):
            if isinstance(tensor, Tensor):
                digest.update(f"{field}/{tensor.dtype}/{tuple(tensor.shape)}/".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.digest()
