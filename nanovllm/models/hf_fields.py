"""Single fields of a config.json: type and bounds, checked where they are read.

Owns the messages. Does not own what a field means (`hf_config.py`, `hf_rope.py`, `mixture.py`). Invariant: what these
functions return can be computed with; a value that cannot be is a ValueError that names the field.
"""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

# Far beyond every model there is; and MAX_SIZE * MAX_SIZE * MAX_EXPERTS numbers can still be counted in 63 bits.
MAX_SIZE = 2**24
MAX_LAYERS = 2**14
MAX_EXPERTS = 2**11


def integer(hf: Mapping[str, Any], name: str, *, low: int = 1, high: int = MAX_SIZE) -> int:
    """A required integer from `low` to `high`."""
    value = hf.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"config.json: {name} must be an integer from {low} to {high}, got {value!r}")
    return value


def number(hf: Mapping[str, Any], name: str, *, at_least: float | None = None, above: float = 0.0) -> float:
    """A required finite number more than `above`, or not less than `at_least` where that is given."""
    value = hf.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value):
        is_within = value > above if at_least is None else value >= at_least
        if is_within:
            return float(value)
    bound = f"more than {above:g}" if at_least is None else f"of at least {at_least:g}"
    raise ValueError(f"config.json: {name} must be a finite number {bound}, got {value!r}")


def flag(hf: Mapping[str, Any], name: str) -> bool:
    """True or False; False if it is missing or null."""
    value = hf.get(name)
    if not isinstance(value, bool) and value is not None:
        raise ValueError(f"config.json: {name} must be true or false, got {value!r}")
    return bool(value)


def items(hf: Mapping[str, Any], name: str, is_item: Callable[[Any], bool], what: str) -> Sequence[Any]:
    """A required list of `what`, each of which `is_item` accepts."""
    value = hf.get(name)
    if not isinstance(value, (list, tuple)) or not all(is_item(item) for item in value):
        raise ValueError(f"config.json: {name} must be a list of {what}, got {value!r}")
    return value


def mapping(hf: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object, as a copy; {} if it is missing or null."""
    value = hf.get(name)
    if not isinstance(value, Mapping) and value is not None:
        raise ValueError(f"config.json: {name} must be an object, got {value!r}")
    return dict(value or {})


def _is_finite(value: float) -> bool:
    try:
        return isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False
