"""GGUFMetadata: the metadata of one architecture in a GGUF file, read by key with type and default.

Owns the messages, and the book of which keys were read. Does not own what they mean (`gguf_architectures.py`).
Invariant: after `refuse_unread`, every key of the architecture was read, or says that something is not there.
"""

from math import isfinite
from typing import Any

import numpy as np

from nanovllm.model_files.gguf_file import GGUFFile

# Keys that say nothing a forward pass needs.
_WITHOUT_EFFECT = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")
# Keys of features that are not here, with the values that say so.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_feed_forward_length": (0,),
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "use_parallel_residual": (False,),
}


class GGUFMetadata:
    """prefix: the architecture, which every key is below. Raises ValueError that names file, key and value."""

    def __init__(self, file: GGUFFile, prefix: str) -> None:
        self.file = file
        self.prefix = prefix
        self._read: set[str] = set(_WITHOUT_EFFECT)

    def has(self, key: str) -> bool:
        return f"{self.prefix}.{key}" in self.file.metadata

    def integer(self, key: str, default: int | None = None) -> int:
        """Required if there is no default; 0 or more."""
        value = self._one(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._error(key, value, "an integer of at least 0")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Required if there is no default; finite."""
        value = self._one(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
            raise self._error(key, value, "a finite number")
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self._one(key, default)
        if not isinstance(value, str):
            raise self._error(key, value, "a string")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._one(key, default)
        if not isinstance(value, bool):
            raise self._error(key, value, "true or false")
        return value

    def by_layer(self, key: str) -> Any:
        """A value that may be a list with one item a layer; None if it is missing."""
        self._read.add(key)
        value = self.file.metadata.get(f"{self.prefix}.{key}")
        return value.tolist() if isinstance(value, np.ndarray) else value

    def each_layer(self, key: str, num_layers: int) -> list[Any]:
        """A required list with one item a layer."""
        value = self.by_layer(key)
        if not isinstance(value, list) or len(value) != num_layers:
            raise self._error(key, value, f"a list with a number for each of {num_layers} layers")
        return value

    def expect(self, key: str, supported: Any) -> None:
        """Refuse any other value of a key that may be missing. Raises NotImplementedError."""
        value = self._one(key, supported)
        if value != supported:
            raise NotImplementedError(
                f"{self.file.path}: {self.prefix}.{key} = {value} is not supported, only {supported} is here"
            )

    def ignore(self, *keys: str) -> None:
        """Count keys as read that say something about parts that the model does not have."""
        self._read.update(keys)

    def refuse_unread(self) -> None:
        """Raises NotImplementedError for a key that would change the result and that nobody read."""
        for name, value in self.file.metadata.items():
            key = name.removeprefix(self.prefix + ".")
            if key == name or key in self._read or _says_not_there(key, value):
                continue
            raise NotImplementedError(f"{self.file.path}: metadata {name} = {value} is not understood, so not run")

    def _one(self, key: str, default: Any) -> Any:
        self._read.add(key)
        value = self.file.metadata.get(f"{self.prefix}.{key}", default)
        if value is None:
            raise ValueError(f"{self.file.path}: metadata {self.prefix}.{key} is missing")
        if isinstance(value, np.ndarray) and len(value):  # one number a layer
            if len(set(value.tolist())) != 1:
                raise NotImplementedError(
                    f"{self.file.path}: {self.prefix}.{key} differs between layers: {value.tolist()}"
                )
            return value[0].item()
        return value

    def _error(self, key: str, value: Any, wanted: str) -> ValueError:
        return ValueError(f"{self.file.path}: metadata {self.prefix}.{key} must be {wanted}, got {value!r}")


def _says_not_there(key: str, value: Any) -> bool:
    values = value.tolist() if isinstance(value, np.ndarray) else [value]
    return key in _NEUTRAL and all(item in _NEUTRAL[key] for item in values)
