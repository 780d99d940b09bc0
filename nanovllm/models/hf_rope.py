"""Rotary embedding in a Hugging Face config.json: which field wins, which layer has which, and what each type needs.

Owns `rope_parameters`, `rope_scaling`, `rope_theta` and the fields beside them. Does not own the frequencies
(`layers/rope_scaling.py`). Invariant: a RopeConfig that is returned can be computed, and says all that the config does.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from math import log, sqrt
from typing import Any

from nanovllm.model_config import RopeConfig
from nanovllm.models.hf_fields import MAX_SIZE, flag, integer, mapping, number

LAYER_TYPES = ("full_attention", "sliding_attention")
_DEFAULT_THETA = 10000.0
_MAX_FACTOR = 2.0**20
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
    "longrope": (),  # see _read_longrope
    "proportional": (),
}
_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow")
_OTHERS = ("original_max_position_embeddings", "mscale", "mscale_all_dim", "truncate", "short_factor", "long_factor")


def read_ropes(
    hf: Mapping[str, Any],
    layer_types: Sequence[str],
    has_rope: Sequence[bool],
    max_position_embeddings: int,
    head_dim: int,
    adapt: Callable[..., Mapping[str, Any] | None] | None = None,
) -> tuple[RopeConfig | None, ...]:
    """One a layer, from `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling` (before), or both.

    A `rope_scaling` beside `rope_parameters` was added by hand, and wins as in transformers: it takes the whole place
    of the other, or with one rotation a layer type, is laid over that of the layers that see all. adapt: `rope` of an
    `Architecture`.
    """
    saved, added = mapping(hf, "rope_parameters"), mapping(hf, "rope_scaling")
    if "rope_local_base_freq" in hf:  # the layers with a window have a base of their own, and are never stretched
        if not any(layer_type in saved for layer_type in LAYER_TYPES):
            saved = {"full_attention": saved}
        local = {"rope_theta": hf["rope_local_base_freq"]}
        by_type = {
            "full_attention": {**mapping(saved, "full_attention"), **added},
            "sliding_attention": {**local, **mapping(saved, "sliding_attention")},
        }
    elif any(layer_type in saved for layer_type in LAYER_TYPES) and not added:
        by_type = {layer_type: mapping(saved, layer_type) for layer_type in LAYER_TYPES}
    else:
        by_type = dict.fromkeys(LAYER_TYPES, added or saved)
        lost = saved.get("rope_theta") if added else None
        if lost is not None and lost != (added.get("rope_theta") or hf.get("rope_theta") or _DEFAULT_THETA):
            warnings.warn(
                f"config.json: rope_scaling takes the place of rope_parameters, as in transformers, and with it of "
                f"rope_theta={lost}; repeat rope_theta in rope_scaling if the model was trained with it",
                stacklevel=2,
            )
    ropes: dict[str, RopeConfig | None] = {}
    for layer_type in set(layer_types):
        if layer_type not in by_type:  # it keeps a state
            ropes[layer_type] = None
            continue
        given = by_type[layer_type] if adapt is None else adapt(hf, layer_type, by_type[layer_type])
        rope = None if given is None else _read_rope(hf, given, max_position_embeddings, head_dim)
        ropes[layer_type] = rope
    return tuple(ropes[layer_type] if has else None for layer_type, has in zip(layer_types, has_rope, strict=True))


def _read_rope(
    hf: Mapping[str, Any], given: Mapping[str, Any], max_position_embeddings: int, head_dim: int
) -> RopeConfig:
    parameters = {name: value for name, value in given.items() if value is not None}
    rope_type = _first(parameters.pop("rope_type", None), parameters.pop("type", None), "default")
    theta = _first(parameters.pop("rope_theta", None), hf.get("rope_theta"), _DEFAULT_THETA)
    theta = number({"rope_theta": theta}, "rope_theta", above=1.0)
    share = _first(parameters.pop("partial_rotary_factor", None), hf.get("partial_rotary_factor"), 1.0)
    share = number({"partial_rotary_factor": share}, "partial_rotary_factor")
    if rope_type == "proportional":  # pairs lie as in a whole head, and those behind the rotated ones stand still
        rotated, share = min(share, 1.0), 1.0
    if rope_type in ("su", "yarn") and "short_factor" in parameters:
        rope_type = "longrope"  # what Phi-3's first configs called it
    if not isinstance(rope_type, str) or rope_type not in _REQUIRED:
        raise ValueError(f"config.json: rope_type {rope_type!r} is not supported; supported are {', '.join(_REQUIRED)}")
    if share != 1.0 and "partial_rotary_factor" not in hf:
        raise ValueError(f"partial_rotary_factor={share} is not supported for this architecture; only 1.0 is")
    rotary_dim = int(min(head_dim * share, MAX_SIZE))
    if not 2 <= rotary_dim <= head_dim or rotary_dim % 2 or head_dim % 2:
        raise ValueError(
            f"config.json: head_dim {head_dim} with partial_rotary_factor {share} rotates {rotary_dim} dimensions; it "
            "must be an even number of them"
        )
    if rope_type == "dynamic" and rotary_dim < 4:
        raise ValueError(f"config.json: rope type 'dynamic' needs a head_dim of at least 4, got {head_dim}")
    try:
        parameters = _check(rope_type, parameters)
        if rope_type == "longrope":
            parameters = _read_longrope(hf, parameters, max_position_embeddings, rotary_dim)
    except ValueError as error:
        raise ValueError(f"{error}, in the rope parameters {dict(given)}") from None
    if rope_type == "proportional":
        parameters["rotated_share"] = rotated
    # dynamic never looks at it, as in transformers
    if rope_type == "dynamic" or (rope_type == "yarn" and "original_max_position_embeddings" not in parameters):
        parameters["original_max_position_embeddings"] = max_position_embeddings
    rope = RopeConfig(rope_type=rope_type, theta=theta, share=share, parameters=parameters)
    if rope.max_positions(max_position_embeddings) > MAX_SIZE:
        raise ValueError(
            f"config.json: max_position_embeddings stretched by the factor of {dict(given)} is more than {MAX_SIZE}"
        )
    return rope


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _check(rope_type: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of this type, each with a value that can be."""
    for name in parameters:
        if name not in _NUMBERS and name not in _OTHERS:
            raise ValueError(f"config.json: {name!r} is not understood, so the model would be run wrongly")
    if rope_type == "default":
        return {}
    for name in _REQUIRED[rope_type]:
        if name not in parameters:
            raise ValueError(f"config.json: rope type {rope_type!r} needs {name!r}")
    for name in _NUMBERS:
        if name in parameters and number(parameters, name) > _MAX_FACTOR:
            raise ValueError(f"config.json: {name} must be at most {_MAX_FACTOR:g}, got {parameters[name]!r}")
    for name in ("mscale", "mscale_all_dim"):
        if name in parameters:
            number(parameters, name, at_least=0.0)
    if "original_max_position_embeddings" in parameters:
        integer(parameters, "original_max_position_embeddings", low=2)
    if "truncate" in parameters:
        flag(parameters, "truncate")
    if rope_type == "llama3" and parameters["low_freq_factor"] >= parameters["high_freq_factor"]:
        raise ValueError("config.json: low_freq_factor must be less than high_freq_factor")
    return dict(parameters)


def _read_longrope(
    hf: Mapping[str, Any], parameters: Mapping[str, Any], max_position_embeddings: int, rotary_dim: int
) -> dict[str, Any]:
    for name in ("short_factor", "long_factor"):
        factors = parameters.get(name)
        if not isinstance(factors, list) or len(factors) != rotary_dim // 2:
            raise ValueError(
                f"config.json: rope type 'longrope' needs {name!r}, a list of {rotary_dim // 2} numbers, "
                f"got {factors!r}"
            )
        for factor in factors:
            number({name: factor}, name)
    given = hf if hf.get("original_max_position_embeddings") is not None else parameters
    original = max_position_embeddings
    if given.get("original_max_position_embeddings") is not None:
        original = integer(given, "original_max_position_embeddings", low=2)
    factor = parameters.get("factor") or max_position_embeddings / original
    sharper = sqrt(1 + log(factor) / log(original)) if factor > 1 else 1.0
    return {
        "short_factor": parameters["short_factor"],
        "long_factor": parameters["long_factor"],
        "original_max_position_embeddings": original,
        "attention_factor": parameters.get("attention_factor", sharper),
    }
