"""Request bodies: JSON within bounds, and its fields one by one, each with its kind.

Owns what every route asks of a body. Invariant: a field that nobody took is refused by its name, so that no option is
accepted and ignored.
"""

import asyncio
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from nanovllm.errors import brief

MAX_BYTES = 32 * 2**20
MAX_VALUES = (
    4_000_000  # numbers, texts, lists and objects in a body, of which each takes much more memory than its text
)
MAX_DEPTH = 64  # of nested lists and objects: schemas are a dozen deep
MAX_SECONDS = 120.0  # to send one: a connection that trickles is a descriptor held

Kind = TypeVar("Kind")


class BadRequest(ValueError):
    """The client's mistake. param: the field; status: of the response."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


@contextmanager
def checking(param: str | None = None) -> Iterator[None]:
    """Around checks of a request that say ValueError or TypeError: what they find is the client's mistake."""
    try:
        yield
    except BadRequest:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        raise BadRequest(str(error), param) from error


async def read_body(request: Request) -> "Body":
    """The body of a request as JSON. Raises BadRequest for one that is too long, too deep or no JSON object."""
    # A page on any site can have a browser send texts and forms here, and nothing of this type unless it is allowed to.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequest(f"content-type must be application/json, got {brief(kind)}", status=415)
    try:
        async with asyncio.timeout(MAX_SECONDS):
            text = await _read_bytes(request)
    except ClientDisconnect as error:
        raise BadRequest("the client went away") from error
    except TimeoutError as error:
        raise BadRequest(f"the body did not come within {MAX_SECONDS:.0f} s", status=408) from error
    num_open = text.count(b"[") + text.count(b"{")
    if text.count(b",") + num_open > MAX_VALUES:
        raise BadRequest(f"the body holds more than {MAX_VALUES:,} values", status=413)
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is no JSON: {brief(str(error))}") from error
    if not isinstance(value, dict):
        raise BadRequest(f"the body must be a JSON object, got {brief(value)}")
    if num_open > MAX_DEPTH:
        _check_depth(value)
    return Body(value)


async def _read_bytes(request: Request) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BYTES:
            raise BadRequest(f"the body is larger than {MAX_BYTES:,} bytes", status=413)
        parts.append(part)
    return b"".join(parts)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise BadRequest(f"the body is nested more than {MAX_DEPTH} deep")


class Body:
    """The fields of an object that are not taken yet. path: of the object in the body, for messages."""

    def __init__(self, fields: Mapping[str, Any], path: str = "") -> None:
        self._fields = dict(fields)
        self._path = path
        self._known: list[str] = []

    def take(self, name: str, kind: type[Kind] | tuple[type, ...], default: Any = None) -> Any:
        """The field, of this kind; `default` where it is missing or null. An integer is a float, True is neither."""
        self._known.append(name)
        value = self._fields.pop(name, None)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds and isinstance(value, int):
            kinds = (*kinds, int)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(_JSON_NAMES[one] for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise BadRequest(f"{self._path}{name} must be {names}, got {brief(value)}", param=self._path + name)
        return value

    def look(self, name: str, default: Any) -> Any:
        """The field as it is, for an answer that repeats it; it is still to be taken."""
        value = self._fields.get(name)
        return default if value is None else value

    def require(self, name: str, kind: type[Kind] | tuple[type, ...]) -> Any:
        value = self.take(name, kind)
        if value is None:
            raise BadRequest(f"{self._path}{name} is missing", param=self._path + name)
        return value

    def choose(self, name: str, choices: Collection[str], default: str) -> str:
        value: str = self.take(name, str, default)
        if value not in choices:
            raise BadRequest(
                f"{self._path}{name} must be {' or '.join(map(repr, choices))}, got {brief(value)}",
                param=self._path + name,
            )
        return value

    def inner(self, name: str) -> "Body | None":
        """An object inside, whose fields are taken in turn."""
        value = self.take(name, dict)
        return None if value is None else Body(value, f"{self._path}{name}.")

    def require_inner(self, name: str) -> "Body":
        return Body(self.require(name, dict), f"{self._path}{name}.")

    def of(self, item: Any, name: str) -> "Body":
        """The fields of an object that stands in a list, or wherever else `take` has found it."""
        if not isinstance(item, dict):
            raise BadRequest(f"{self._path}{name} must be an object, got {brief(item)}", param=self._path + name)
        return Body(item, f"{self._path}{name}.")

    def ignore(self, *names: str) -> None:
        """Fields that say nothing about the answer, or ask for what is so anyway."""
        for name in names:
            self._known.append(name)
            self._fields.pop(name, None)

    def refuse(self, name: str, neutral: Collection[Any], why: str) -> None:
        """A field that is not supported: taken where it asks for nothing."""
        self._known.append(name)
        value = self._fields.pop(name, None)
        if value is not None and value not in neutral:
            raise BadRequest(f"{self._path}{name} is not supported: {why}; got {brief(value)}", param=self._path + name)

    def finish(self) -> None:
        """Refuse what is left."""
        for name in self._fields:
            nearest = get_close_matches(name[:100], self._known, n=1, cutoff=0.75)  # comparing long texts takes seconds
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise BadRequest(f"{self._path}{brief(name)[1:-1]} is not supported{hint}", param=self._path + name[:100])


_JSON_NAMES: dict[type, str] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
