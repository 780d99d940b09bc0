"""Regular expressions as Python and JSON Schema write them, for a library that reads Rust's.

Owns character classes, in which Rust knows set operations (`&&`, `--`, `~~`) and classes inside classes. Invariant:
every character of a class stands for itself, as in the other notations; what is no class stays as it was.
"""

import re
from collections.abc import Iterator

_CLASS = re.compile(
    r"\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|\\[pP]\{[^}]*\}|\\.|\[:\^?\w+:\]|.", re.DOTALL
)  # one member: an escape, a POSIX class, a character


def plain_classes(pattern: str) -> str:
    """The pattern, with classes that mean the same in Rust."""
    parts = []
    at = 0
    while at < len(pattern):
        if pattern[at] == "[":
            text, at = _read_class(pattern, at)
        else:
            size = 2 if pattern[at] == "\\" else 1
            text = pattern[at : at + size]
            at += size
        parts.append(text)
    return "".join(parts)


def _read_class(pattern: str, start: int) -> tuple[str, int]:
    """The class that begins at `start`, rewritten, and where it ends. One without an end is left to the library."""
    at = start + 1
    opening = "["
    if pattern[at : at + 1] == "^":
        opening, at = "[^", at + 1
    members: list[str] = []
    while at < len(pattern) and (pattern[at] != "]" or not members):
        found = _CLASS.match(pattern, at)
        assert found is not None
        members.append(found[0])
        at = found.end()
    if at >= len(pattern):
        return pattern[start:], len(pattern)
    return opening + "".join(_ranges(members)) + "]", at + 1


def _ranges(members: list[str]) -> Iterator[str]:
    at = 0
    while at < len(members):
        yield _escaped(members[at])
        if members[at + 1 : at + 2] == ["-"] and at + 2 < len(members):
            yield "-" + _escaped(members[at + 2])
            at += 2
        at += 1


def _escaped(member: str) -> str:
    return "\\" + member if len(member) == 1 and member in "[]^-&~\\" else member
