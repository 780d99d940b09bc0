"""Options as data: what a field of an options class accepts stands beside the field, and one check reads it.

Owns the kinds of values (by a field's type), their bounds and their messages. A field's help is its line in the class
docstring; `cli/options.py` makes flags of the same table. Invariant: what was checked is plain: NumPy's numbers are int
and float then, lists are tuples, and every number is one that float32, in which it is computed with, can hold.
"""

import math
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from functools import cache, wraps
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from nanovllm.errors import reject_unknown_options
from nanovllm.plain_lists import read_list
from nanovllm.plain_numbers import as_float32, read_integer, read_number

Owner = TypeVar("Owner", bound=type)


@dataclass(frozen=True, kw_only=True)
class Accepts:
    """What a field accepts beyond what its type says.

    low, high: bounds that belong to the range; above: one that does not. choices: the only values.
    words: the range as the error tells it, where its numbers alone do not.
    read: turns other forms of a value into the one that is checked.
    has_flag: whether the command line can give it.
    """

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    choices: tuple[Any, ...] = ()
    words: str | None = None
    read: Callable[[Any], Any] | None = None
    has_flag: bool = True

    def check_range(self, name: str, value: Any, compared: float) -> Any:
        """value, if `compared`, which is what the engine will compute with, is in range."""
        if self.low <= compared <= self.high and (compared > self.above or self.above == -math.inf):
            return value
        words = self.words or (f"at least {self.low}" if self.above == -math.inf else f"above {self.above}")
        if self.words is None and self.high < math.inf:
            words = f"in [{self.low}, {self.high}]" if self.above == -math.inf else f"in ({self.above}, {self.high}]"
        raise ValueError(f"{name} must be {words}, got {value}")


def option(default: Any = MISSING, *, hash: bool | None = None, **accepts: Any) -> Any:
    """A dataclass field, with or without a default; accepts: the arguments of `Accepts`."""
    return field(default=default, hash=hash, metadata={"accepts": Accepts(**accepts)})


def accepts(of: "Field[Any]") -> Accepts:
    found: Accepts = of.metadata.get("accepts") or Accepts()
    return found


def takes_options(owner: Owner) -> Owner:
    """Class decorator of an options dataclass: a name that it does not have raises TypeError with the right one.

    An option of vLLM that is not here may be given with the value that asks for nothing.
    """
    initialise, known = owner.__init__, {option.name: None for option in fields(owner)}  # type: ignore[misc]

    @wraps(initialise)
    def init(self: Any, *args: Any, **given: Any) -> None:
        if not given.keys() <= known.keys():
            from nanovllm.vllm_options import drop_absent  # a leaf: most options are known

            given = drop_absent(owner.__name__, given)
            reject_unknown_options(owner.__name__, given, known)
        initialise(self, *args, **given)

    owner.__init__ = init  # type: ignore[misc]
    return owner


def check_fields(owner: Any, prefix: str = "") -> None:
    """Check every field, and leave each in its plain form. Raises TypeError or ValueError that names field and value.

    prefix: what stands before a field's name in the messages.
    """
    for name, default, kinds, accepted in _table(type(owner)):  # type: ignore[arg-type]
        value = getattr(owner, name)
        if value is default:  # nearly all are, and what stands in the class is plain
            continue
        checked = _check(prefix + name, value, kinds, accepted)
        if checked is not value:
            object.__setattr__(owner, name, checked)


@cache
def _table(owner: Any) -> list[tuple[str, Any, tuple[Any, ...], Accepts]]:
    """(name, default, types, what it accepts) of each field."""
    return [(option.name, option.default, kinds_of(option.type), accepts(option)) for option in fields(owner)]


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The types of which a value may be one."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _check(name: str, value: Any, kinds: tuple[Any, ...], accepted: Accepts) -> Any:
    if accepted.read is not None:
        value = accepted.read(value)
    if accepted.choices:
        if value not in accepted.choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, accepted.choices))}, got {value!r}")
        return accepted.choices[accepted.choices.index(value)]
    kind = kinds[0]
    if value is None and NoneType in kinds:
        return None
    if kind is bool and not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    if kind is str and not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r}")
    if isinstance(kind, type) and issubclass(kind, Enum) and not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {value!r}")
    if get_origin(kind) is tuple:
        return read_list(name, value, get_args(kind)[0])
    if kind is int:
        value = read_integer(name, value)
        accepted.check_range(name, value, value)
    elif kind is float:
        value = read_number(name, value)
        accepted.check_range(name, value, as_float32(value))
    return value  # of any other type, `read` has checked it
