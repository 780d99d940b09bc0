"""From the text of an answer to its pieces: reasoning, content and tool calls, as they come.

Owns what all dialects share of an answer; the parser is transformers'. Invariant: no text is lost and none makes an
error. A call that is cut off, or that nobody can read, is content, as the model wrote it; so is all that follows it.
"""

import json
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from nanovllm.server.response_templates import REASONING_FIELDS


class Call(NamedTuple):
    """One call of a tool. arguments: JSON text."""

    id: str
    name: str
    arguments: str


class Piece(NamedTuple):
    """What a reply has grown by: text of one kind, a call, or more of the last call's arguments."""

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str = ""
    call: Call | None = None


class Reader(Protocol):
    """Reads one answer."""

    def feed(self, text: str) -> list[Piece]: ...

    def finish(self) -> list[Piece]: ...


def new_call(function: Any) -> Call:
    """Of an object with a name and arguments, an object or its JSON text. Raises ValueError for any other."""
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a call needs a name")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    if not isinstance(arguments, dict):
        raise ValueError("the arguments of a call are named")
    return Call(new_call_id(), function["name"], json.dumps(arguments, ensure_ascii=False))


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class PlainReader:
    """For models whose answers are text and nothing else."""

    def feed(self, text: str) -> list[Piece]:
        return [Piece("content", text)] if text else []

    def finish(self) -> list[Piece]:
        return []


class Growing(Protocol):
    """Hands out calls while they are written (`growing_calls.py`)."""

    num_begun: int

    def feed(self, text: str) -> list[Piece]: ...


class FormReader:
    """For answers that a form made calls of: what they are is known once they are whole."""

    def __init__(self, read: Callable[[Any], list[Any]], growing: Growing | None = None) -> None:
        """read: from the JSON value of the answer to functions for `new_call`. growing: for a stream."""
        self._text, self._read, self._growing = "", read, growing

    def feed(self, text: str) -> list[Piece]:
        self._text += text
        return [] if self._growing is None else self._growing.feed(text)

    def finish(self) -> list[Piece]:
        try:
            calls = [new_call(function) for function in self._read(json.loads(self._text))]
        except (ValueError, TypeError, KeyError, RecursionError):
            return [Piece("content", self._text)] if self._text else []
        return [Piece("call", call=call) for call in calls[self._growing.num_begun if self._growing else 0 :]]


class TemplateReader:
    """By a response template. prompt: the text that the answer goes on from. is_parallel: more than one call is one.

    new_growing: for a stream, from a call's name (None where it is in the call's own JSON) and is_parallel.
    """

    def __init__(
        self,
        template: Any,
        prompt: str,
        tools: list[dict[str, Any]],
        is_parallel: bool,
        new_growing: Callable[[str | None, bool], Growing] | None = None,
    ) -> None:
        from transformers.utils.chat_parsing import ResponseParser

        begun = template.truncate_past_last_anchor(prompt)
        if begun == prompt:  # no turn that the template knows: then only what a prompt commonly ends with
            begun = "<think>\n" if prompt.rstrip().endswith("<think>") else ""
        self._parser = ResponseParser(template, prefix=begun, tools=tools)
        kinds = [event["type"] for event in self._parser.initial_events]
        self.begins_inside = kinds.count("region_open") > kinds.count("region_close")
        self._unread = ""  # what was fed and has not become a piece
        self._is_parallel, self._has_called = is_parallel, False
        field = template.fields.get("tool_calls")
        grows = field is not None and field.content == "json" and not field.content_args
        self._call_field = field if new_growing is not None and grows else None
        self._new_growing = new_growing
        self._growing: Growing | None = None  # of the calls that are being written
        self._is_broken = False
        self._after_reasoning = "region_open" in kinds  # then white space before the content is the template's

    def feed(self, text: str) -> list[Piece]:
        if self._is_broken:
            return [Piece("content", text)] if text else []
        self._unread += text
        return self._read(lambda: self._parser.feed(text))

    def finish(self) -> list[Piece]:
        return [] if self._is_broken else self._read(lambda: self._parser.finalize()[1])

    def _read(self, parse: Callable[[], list[dict[str, Any]]]) -> list[Piece]:
        pieces: list[Piece] = []
        try:
            for event in parse():
                pieces += self._pieces(event)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # what a model wrote may be anything
            self._is_broken = True
            pieces.append(Piece("content", self._unread))
            self._unread = ""
        return pieces

    def _pieces(self, event: dict[str, Any]) -> list[Piece]:
        name = event["field"]
        if name == "tool_calls":
            return self._call_pieces(event)
        if event["type"] != "region_chunk":
            return []
        text = event["text"]
        self._unread = self._unread.partition(text)[2]
        if name in REASONING_FIELDS:
            self._after_reasoning = True
            return [Piece("reasoning", text)]
        if name != "content":
            return []
        if self._after_reasoning:
            text = text.lstrip()
            self._after_reasoning = not text
        return [Piece("content", text)] if text else []

    def _call_pieces(self, event: dict[str, Any]) -> list[Piece]:
        if event["type"] == "region_open":
            self._growing = self._begin_call()
            return []
        if event["type"] == "region_chunk":
            return [] if self._growing is None else self._growing.feed(event["text"])
        value, num_begun = event["value"], 0 if self._growing is None else self._growing.num_begun
        calls = [new_call(one["function"]) for one in (value if isinstance(value, list) else [value])]
        self._unread, self._growing = "", None
        kept = calls[num_begun:] if self._is_parallel else [] if self._has_called or num_begun else calls[:1]
        self._has_called = True
        return [Piece("call", call=call) for call in kept]

    def _begin_call(self) -> Growing | None:
        field = self._call_field
        if field is None or self._new_growing is None or (self._has_called and not self._is_parallel):
            return None
        found = field.open_re.search(self._unread)
        name = None if found is None else found.groupdict().get("name")
        return self._new_growing(name, self._is_parallel)


@dataclass
class Reply:
    """All the pieces of one answer."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            if piece.call is not None:
                self.calls.append(piece.call)
            elif piece.kind == "arguments":
                self.calls[-1] = self.calls[-1]._replace(arguments=self.calls[-1].arguments + piece.text)
            elif piece.kind == "reasoning":
                self.reasoning += piece.text
            else:
                self.content += piece.text


def read_pieces(reader: Reader, text: str) -> list[Piece]:
    return [*reader.feed(text), *reader.finish()]


def read_whole(reader: Reader, text: str) -> Reply:
    reply = Reply()
    reply.add(read_pieces(reader, text))
    return reply


def merged(pieces: Iterable[Piece]) -> list[Piece]:
    """With texts of one kind that follow each other made one."""
    result: list[Piece] = []
    for piece in pieces:
        if result and piece.call is None and result[-1].kind == piece.kind:
            result[-1] = piece._replace(text=result[-1].text + piece.text)
        else:
            result.append(piece)
    return result
