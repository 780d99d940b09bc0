"""Which architectures run, and with which switches: one row each, read top to bottom.

Owns the table. Invariant: an architecture that is not in it is refused by name before any weight is read.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

from nanovllm.config import ModelConfig


class Architecture(NamedTuple):
    module: str  # "module:class"
    qkv_bias: bool | None = None  # None: as the config's attention_bias says
    qk_norm: bool = False


_DENSE = "nanovllm.models.llama:LlamaForCausalLM"

ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(_DENSE),  # Llama 2 and 3, SmolLM2
    "MistralForCausalLM": Architecture(_DENSE, qkv_bias=False),
    "Qwen2ForCausalLM": Architecture(_DENSE, qkv_bias=True),
    "Qwen3ForCausalLM": Architecture(_DENSE, qk_norm=True),
}


def read_model_config(hf: Mapping[str, Any], dtype: str) -> ModelConfig:
    """ModelConfig of a config.json dict; ValueError names an architecture or field that is not supported."""
    return ModelConfig.from_hf(hf, dtype=dtype, qkv_bias=_architecture(hf).qkv_bias, qk_norm=_architecture(hf).qk_norm)


def model_class(architecture: str) -> Any:
    """The class that implements a name from ARCHITECTURES: `cls(config, max_len, dtype, tp, ops)`."""
    module, name = ARCHITECTURES[architecture].module.split(":")
    return getattr(import_module(module), name)


def _architecture(hf: Mapping[str, Any]) -> Architecture:
    names = hf.get("architectures") or [None]
    if names[0] not in ARCHITECTURES:
        raise ValueError(f"architecture {names[0]!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[names[0]]
