"""Numbers that callers give, of Python or of NumPy: checked, and made plain.

Owns what counts as an integer or a number. Invariant: what is returned is an int or a float that float32, in which it
is computed with, can hold.
"""

import math
import operator
import struct
from numbers import Real
from typing import Any


def read_integer(name: str, value: Any) -> int:
    """What Python can count with, NumPy's integers too; but no truth value."""
    if type(value) is int:
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def read_number(name: str, value: Any) -> float:
    """A real number that float32 can hold, of Python or of NumPy."""
    if type(value) not in (float, int):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
        value = float(value)
    if not math.isfinite(as_float32(value)):
        is_number = value == value and abs(value) != math.inf
        raise ValueError(f"{name} must be finite{' in float32' if is_number else ''}, got {value}")
    return value


def as_float32(value: float) -> float:
    """The float32 nearest to a number; infinite where float32 ends."""
    try:
        return float(struct.unpack("f", struct.pack("f", float(value)))[0])
    except OverflowError:
        return math.inf if value > 0 else -math.inf
