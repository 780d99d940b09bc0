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
    """What a reply has grown by: text of one kind, or a whole call."""

    kind: Literal["content", "reasoning", "call"]
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
    return Call(f"call_{uuid.uuid4().hex[:24]}", function["name"], json.dumps(arguments, ensure_ascii=False))


class PlainReader:
    """For models whose answers are text and nothing else."""

    def feed(self, text: str) -> list[Piece]:
        return [Piece("content", text)] if text else []

    def finish(self) -> list[Piece]:
        return []


class FormReader:
    """For answers that a form made calls of: what they are is known once they are whole."""

    def __init__(self, read: Callable[[Any], list[Any]]) -> None:
        """read: from the JSON value of the answer to functions for `new_call`."""
        self._text, self._read = "", read

    def feed(self, text: str) -> list[Piece]:
        self._text += text
        return []

    def finish(self) -> list[Piece]:
        try:
            return [Piece("call", call=new_call(function)) for function in self._read(json.loads(self._text))]
        except (ValueError, TypeError, KeyError, RecursionError):
            return [Piece("content", self._text)] if self._text else []


class TemplateReader:
    """By a response template. prompt: the text that the answer goes on from. is_parallel: more than one call is one."""

    def __init__(self, template: Any, prompt: str, tools: list[dict[str, Any]], is_parallel: bool) -> None:
        from transformers.utils.chat_parsing import ResponseParser

        begun = template.truncate_past_last_anchor(prompt)
        if begun == prompt:  # no turn that the template knows: then only what a prompt commonly ends with
            begun = "<think>\n" if prompt.rstrip().endswith("<think>") else ""
        self._parser = ResponseParser(template, prefix=begun, tools=tools)
        kinds = [event["type"] for event in self._parser.initial_events]
        self.begins_inside = kinds.count("region_open") > kinds.count("region_close")
        self._unread = ""  # what was fed and has not become a piece
        self._is_parallel, self._has_called = is_parallel, False
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
            if event["type"] != "region_close":
                return []
            value = event["value"]
            calls = [new_call(one["function"]) for one in (value if isinstance(value, list) else [value])]
            self._unread = ""
            kept = calls if self._is_parallel else [] if self._has_called else calls[:1]
            self._has_called = True
            return [Piece("call", call=call) for call in kept]
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
