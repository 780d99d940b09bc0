"""Architecture: how one name in config.json's `architectures` is run.

Owns the form of a row; the rows are in `registry.py`, `dense_families.py` and `mixture_families.py`. Invariant: plain
data, so that reading the table imports neither torch nor a model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nanovllm.cache_specs import StateShape


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """fields: config.json fields beside those of all decoders, with the values they have when missing (transformers'
        defaults); ModelConfig.extra hands them to the model. It may also hold other defaults for common fields.
    switches: ModelConfig fields that the architecture sets; a function gets the config.json dict, defaults filled in.
    rope: what becomes of the parameters of a layer's rotation: called with (config.json dict, layer type, parameters),
        returns those that hold, or None for a layer without rotation.
    states: the layer types that keep a state in the place of keys and values; how large it is, of a config.json dict.
    translate: the fields of a config.json dict that are said in words of the family's own, in those of all decoders.
    model: a class, or its "module:name", called with (config, max_len, dtype, tp, ops).
    attention, mlp: another block for the decoder, likewise, called with (config, layer_idx, dtype, tp, ops).
    norm: another norm of hidden states, likewise, called with (config, dtype, ops).
    serves: the models it is for, in words. proof: the test that holds it beside transformers.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    switches: Mapping[str, Any] = field(default_factory=dict)
    rope: Callable[[Mapping[str, Any], str, Mapping[str, Any]], Mapping[str, Any] | None] | None = None
    states: Mapping[str, Callable[[Mapping[str, Any]], StateShape]] = field(default_factory=dict)
    translate: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    model: str | Callable[..., Any] = "nanovllm.models.llama:LlamaForCausalLM"
    attention: str | Callable[..., Any] | None = None
    mlp: str | Callable[..., Any] | None = None
    norm: str | Callable[..., Any] | None = None
    serves: str = ""
    proof: str = ""
