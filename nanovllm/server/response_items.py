"""The items of /v1/responses: those of a body become a conversation, and an answer becomes items, event by event.

Owns both ways. Invariant: what one turn of the assistant was (thoughts, text, calls) is one message of the
conversation, as chat templates want it, though it comes as several items.
"""

import json
from typing import Any

from nanovllm.server.body import BadRequest, Body
from nanovllm.server.reply import Piece
from nanovllm.server.tools import NO_ARGUMENTS, Tools, make_tools

# -- the body --


def take_input(body: Body, instructions: str | None) -> list[dict[str, Any]]:
    """Messages for a chat template."""
    given = body.require("input", (str, list))
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    for i, item in enumerate(given):
        _add_item(messages, body.of(item, f"input[{i}]"))
    return messages


def _add_item(messages: list[dict[str, Any]], item: Body) -> None:
    kind = item.choose("type", ("message", "function_call", "function_call_output", "reasoning"), "message")
    item.ignore("id", "status")
    if kind == "message":
        role = item.choose("role", ("user", "assistant", "system", "developer"), "user")
        content = item.require("content", (str, list))
        item.ignore("phase")
        if role == "assistant":
            turn = _turn(messages)
            turn["content"] = content if turn["content"] is None else [*_parts(turn["content"]), *_parts(content)]
        else:
            messages.append({"role": "system" if role == "developer" else role, "content": content})
    elif kind == "function_call":
        function = {"name": item.require("name", str), "arguments": item.require("arguments", str)}
        call = {"id": item.require("call_id", str), "type": "function", "function": function}
        _turn(messages).setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        result = {"role": "tool", "tool_call_id": item.require("call_id", str)}
        messages.append({**result, "content": item.require("output", (str, list))})
    else:
        texts = []
        for i, given in enumerate(item.take("content", list, [])):
            part = item.of(given, f"content[{i}]")
            part.choose("type", ("reasoning_text",), "reasoning_text")
            texts.append(part.require("text", str))
            part.finish()
        item.ignore("summary", "encrypted_content")
        if texts:
            _turn(messages)["reasoning_content"] = "\n".join(texts)
    item.finish()


def _turn(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message that the next item belongs to."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _parts(content: str | list[Any]) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def take_function_tools(body: Body) -> Tools | None:
    functions = []
    for i, item in enumerate(body.take("tools", list, [])):
        tool = body.of(item, f"tools[{i}]")
        tool.choose("type", ("function",), "function")
        function = {"name": tool.require("name", str), "description": tool.take("description", str, "")}
        functions.append({**function, "parameters": tool.take("parameters", dict, NO_ARGUMENTS)})
        tool.ignore("strict")
        tool.finish()
    is_parallel = body.take("parallel_tool_calls", bool, True)
    choice = body.take("tool_choice", (str, dict), "auto")
    if isinstance(choice, dict):
        chosen = body.of(choice, "tool_choice")
        chosen.choose("type", ("function",), "function")
        name = chosen.require("name", str)
        chosen.finish()
        return make_tools(functions, name, True, is_parallel)
    if choice not in ("none", "auto", "required"):
        raise BadRequest(f"tool_choice must be 'none', 'auto' or 'required', got {choice!r}", param="tool_choice")
    return make_tools(functions, choice, False, is_parallel)


# -- the answer --


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


class ItemStream:
    """Items as the pieces of an answer make them, one open at most, and the events that tell of it.

    output: the items that are done.
    """

    def __init__(self, response_id: str) -> None:
        self.output: list[dict[str, Any]] = []
        self._id = response_id
        self._open: dict[str, Any] | None = None
        self._text = ""

    def add(self, piece: Piece) -> list[dict[str, Any]]:
        kind = {"content": "message", "reasoning": "reasoning"}.get(piece.kind, "function_call")
        events = []
        if self._open is None or self._open["type"] != kind or piece.call is not None:
            events += self.close("completed")
            self._open, self._text = self._new_item(kind, piece), ""
            events.append(self._event("response.output_item.added", item=dict(self._open), is_part=False))
            if piece.call is None:
                events.append(self._event("response.content_part.added", part=self._part()))
        self._text += piece.text if piece.call is None else piece.call.arguments
        if kind == "function_call":
            delta = piece.text if piece.call is None else piece.call.arguments
            of_call = self._event("response.function_call_arguments.delta", delta=delta, is_part=False)
            return [*events, of_call] if delta else events
        if kind == "reasoning":
            return [*events, self._event("response.reasoning_text.delta", delta=piece.text)]
        return [*events, self._event("response.output_text.delta", delta=piece.text, logprobs=[])]

    def close(self, status: str) -> list[dict[str, Any]]:
        """End the item that is open, if there is one."""
        item = self._open
        if item is None:
            return []
        is_whole = _is_json(self._text) if item["type"] == "function_call" else status == "completed"
        item["status"] = "completed" if is_whole else "incomplete"
        if item["type"] == "function_call":
            item["arguments"] = self._text
            done = self._event("response.function_call_arguments.done", arguments=self._text, is_part=False)
            events = [{**done, "name": item["name"]}]
        else:
            item["content"] = [self._part()]
            of_text = (
                self._event("response.reasoning_text.done", text=self._text)
                if item["type"] == "reasoning"
                else self._event("response.output_text.done", text=self._text, logprobs=[])
            )
            events = [of_text, self._event("response.content_part.done", part=self._part())]
        events.append(self._event("response.output_item.done", item=item, is_part=False))
        self.output.append(item)
        self._open = None
        return events

    def _new_item(self, kind: str, piece: Piece) -> dict[str, Any]:
        number = len(self.output)
        if piece.call is not None:
            call = {"call_id": piece.call.id, "name": piece.call.name, "arguments": ""}
            return {"type": kind, "id": f"fc_{self._id}_{number}", "status": "in_progress", **call}
        if kind == "reasoning":
            return {
                "type": kind,
                "id": f"rs_{self._id}_{number}",
                "status": "in_progress",
                "summary": [],
                "content": [],
            }
        return {
            "type": kind,
            "id": f"msg_{self._id}_{number}",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }

    def _part(self) -> dict[str, Any]:
        assert self._open is not None
        if self._open["type"] == "reasoning":
            return {"type": "reasoning_text", "text": self._text}
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": []}

    def _event(self, kind: str, *, is_part: bool = True, **fields: Any) -> dict[str, Any]:
        assert self._open is not None
        place = {"content_index": 0} if is_part else {}
        named = {} if "item" in fields else {"item_id": self._open["id"]}
        return {"type": kind, "output_index": len(self.output), **named, **place, **fields}
