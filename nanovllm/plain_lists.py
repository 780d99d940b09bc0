"""Lists that callers give: of integers, strings or functions, checked and made tuples.

Owns what may be a member. Invariant: an error names the option and the member.
"""

from typing import Any

from nanovllm.plain_numbers import read_integer


def read_list(name: str, value: Any, kind: Any) -> tuple[Any, ...]:
    """A list or tuple of integers, strings or functions, as a tuple."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list, got {value!r}")
    return tuple(_read_member(name, member, kind) for member in value)


def _read_member(name: str, value: Any, kind: Any) -> Any:
    if kind is int:
        try:
            return read_integer(name, value)
        except TypeError:
            raise TypeError(f"{name} must hold integers, got {value!r}") from None
    if kind is str and not isinstance(value, str):
        raise TypeError(f"{name} must hold strings, got {value!r}")
    # A class, as vLLM has processors of a whole batch, can be called too, but for no logits.
    if kind is not str and (not callable(value) or isinstance(value, type)):
        raise TypeError(f"{name} must hold functions (token_ids, logits) -> logits, got {value!r}")
    return value
