"""/v1/messages and /v1/messages/count_tokens, as Anthropic has them and its clients read them.

Owns the routes' fields and the shape of their answers. Invariant: an answer is a list of blocks (thinking, text,
tool_use) in the order in which the model wrote them, in a stream as in a whole.
"""

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.body import BadRequest, Body, read_body
from nanovllm.server.conversation import Conversation, Prepared, take_template_variables
from nanovllm.server.errors import Fault, error_response
from nanovllm.server.events import Asked, EventStream, Writer, unless_gone
from nanovllm.server.reply import Piece, merged, read_pieces
from nanovllm.server.sampling import take_sampling_params
from nanovllm.server.served import Served
from nanovllm.server.tools import NO_ARGUMENTS, Tools, make_tools
from nanovllm.server.usage import num_generated
from nanovllm.structured_outputs import StructuredOutputsParams

_OF_NO_EFFECT = ("metadata", "service_tier", "cache_control", "inference_geo", "speed")


async def messages(request: Request) -> Response:
    served: Served = request.app.state.served
    body = await read_body(request)
    name = served.check_model(body)
    is_stream = body.take("stream", bool, False)
    max_tokens = body.require("max_tokens", int)
    conversation = _take_conversation(body)
    params = _take_params(body, served.defaults, max_tokens, is_stream)
    body.ignore(*_OF_NO_EFFECT)
    body.finish()
    prepared = await conversation.prepare(served, params)
    answer = _Answer(name, request.state.request_id, prepared)
    if is_stream:
        return EventStream(served, [Asked(prepared.prompt, prepared.params, answer.id)], _Events(answer, prepared))
    with served.admitted(1):
        output = await unless_gone(request, served.final(prepared.prompt, prepared.params, answer.id))
    if output is None:
        return Response(status_code=499)
    error = output.outputs[0].error
    if error is not None:
        return error_response(request.url.path, Fault(error, 500))
    return JSONResponse(answer.whole(output))


async def count_tokens(request: Request) -> Response:
    """How many tokens the prompt of a conversation has."""
    served: Served = request.app.state.served
    body = await read_body(request)
    served.check_model(body)
    conversation = _take_conversation(body)
    params = _take_params(body, served.defaults, 1, False)
    body.ignore(*_OF_NO_EFFECT)
    body.finish()
    prepared = await conversation.prepare(served, params)
    return JSONResponse({"input_tokens": len(prepared.prompt["prompt_token_ids"])})


# -- the body --


def _take_params(body: Body, defaults: SamplingParams, max_tokens: int, is_stream: bool) -> SamplingParams:
    more: dict[str, Any] = {"stop": body.take("stop_sequences", list)}
    for other, own in (("stop", "stop_sequences"), ("response_format", "output_config")):
        body.refuse(other, (), f"its name is {own} here")
    body.refuse("n", (1,), "a message is one answer")
    config = body.inner("output_config")
    if config is not None:
        config.ignore("effort")
        form = config.inner("format")
        if form is not None:
            form.choose("type", ("json_schema",), "json_schema")
            more["structured_outputs"] = StructuredOutputsParams(json=form.require("schema", dict))
            form.finish()
        config.finish()
    return take_sampling_params(body, defaults, max_tokens, is_stream, **more)


def _take_conversation(body: Body) -> Conversation:
    given: list[Any] = body.require("messages", list)
    laid_out = [{"role": "system", "content": text} for text in [_take_system(body)] if text]
    for i, item in enumerate(given):
        laid_out += _read_message(body.of(item, f"messages[{i}]"))
    options = take_template_variables(body)
    thinking = body.inner("thinking")
    if thinking is not None:
        kind = thinking.choose("type", ("enabled", "disabled", "adaptive"), "enabled")
        options.setdefault("enable_thinking", kind != "disabled")
        thinking.ignore("budget_tokens", "display")
        thinking.finish()
    if laid_out and laid_out[-1]["role"] == "assistant":  # the answer goes on from it
        options |= {"continue_final_message": True, "add_generation_prompt": False}
    return Conversation(laid_out, options, _take_tools(body))


def _take_system(body: Body) -> str:
    system = body.take("system", (str, list), "")
    return system if isinstance(system, str) else _texts_of(body, system, "system")


def _texts_of(body: Body, blocks: list[Any], name: str) -> str:
    """The text of blocks that may hold nothing else."""
    texts = []
    for i, item in enumerate(blocks):
        block = body.of(item, f"{name}[{i}]")
        block.choose("type", ("text",), "text")
        texts.append(block.require("text", str))
        block.ignore("cache_control", "citations")
        block.finish()
    return "\n".join(texts)


def _read_message(message: Body) -> list[dict[str, Any]]:
    """As chat templates know it: the results of tools are messages of their own, before what the user says."""
    role = message.choose("role", ("user", "assistant", "system"), "user")
    content = message.require("content", (str, list))
    message.finish()
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    texts, thoughts, calls, results = [], [], [], []
    for i, item in enumerate(content):
        block = message.of(item, f"content[{i}]")
        kinds = {"user": ("text", "tool_result"), "assistant": ("text", "thinking", "redacted_thinking", "tool_use")}
        kind = block.choose("type", kinds.get(role, ("text",)), "text")
        if kind == "text":
            texts.append(block.require("text", str))
        elif kind == "thinking":
            thoughts.append(block.require("thinking", str))
        elif kind == "tool_use":
            function = {"name": block.require("name", str), "arguments": block.take("input", dict, {})}
            calls.append({"id": block.require("id", str), "type": "function", "function": function})
        elif kind == "tool_result":
            result = block.take("content", (str, list), "")
            text = result if isinstance(result, str) else _texts_of(block, result, "content")
            results.append({"role": "tool", "tool_call_id": block.require("tool_use_id", str), "content": text})
            block.ignore("is_error")  # the result says so in its own words
        block.ignore("cache_control", "citations", "signature", "data", "caller")
        block.finish()
    if results and not texts:
        return results
    told: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
    if thoughts:
        told["reasoning_content"] = "\n".join(thoughts)
    if calls:
        told["tool_calls"] = calls
    return [*results, told]


def _take_tools(body: Body) -> Tools | None:
    functions = []
    for i, item in enumerate(body.take("tools", list, [])):
        tool = body.of(item, f"tools[{i}]")
        tool.choose("type", ("custom",), "custom")
        name, description = tool.require("name", str), tool.take("description", str, "")
        functions.append(
            {"name": name, "description": description, "parameters": tool.take("input_schema", dict, NO_ARGUMENTS)}
        )
        tool.ignore("cache_control", "strict", "eager_input_streaming", "input_examples")
        tool.finish()
    choice = body.inner("tool_choice")
    if choice is None:
        return make_tools(functions, "auto", False, True)
    kind = choice.choose("type", ("auto", "any", "tool", "none"), "auto")
    is_parallel = not choice.take("disable_parallel_tool_use", bool, False)
    name = choice.take("name", str)
    choice.finish()
    if (kind == "tool") != (name is not None):
        raise BadRequest("tool_choice.name belongs to the type 'tool', and to no other", param="tool_choice.name")
    return make_tools(functions, name or {"any": "required"}.get(kind, kind), name is not None, is_parallel)


# -- the answer --


def _event(kind: str, **fields: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n"


def _block(piece: Piece) -> dict[str, Any]:
    if piece.call is not None:
        return {
            "type": "tool_use",
            "id": piece.call.id,
            "name": piece.call.name,
            "input": json.loads(piece.call.arguments),
        }
    if piece.kind == "reasoning":
        return {"type": "thinking", "thinking": piece.text, "signature": ""}
    return {"type": "text", "text": piece.text}


class _Answer:
    """The answer to one conversation."""

    def __init__(self, model: str, request_id: str, prepared: Prepared) -> None:
        self.id = f"msg_{request_id}"
        self._model, self._prepared = model, prepared

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        pieces = merged(read_pieces(self._prepared.new_reader(False), output.outputs[0].text))
        has_calls = any(piece.call is not None for piece in pieces)
        usage = self.usage(output, num_generated(output))
        return {**self.head(), "content": list(map(_block, pieces)), **self.end(output, has_calls), "usage": usage}

    def head(self) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self._model}

    def usage(self, output: RequestOutput, num_generated: int) -> dict[str, int]:
        return {
            "input_tokens": len(output.prompt_token_ids) - output.num_cached_tokens,
            "cache_read_input_tokens": output.num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": num_generated,
        }

    def end(self, output: RequestOutput, has_calls: bool) -> dict[str, Any]:
        completion = output.outputs[0]
        if completion.finish_reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if isinstance(completion.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": completion.stop_reason}
        return {"stop_reason": "tool_use" if has_calls else "end_turn", "stop_sequence": None}


class _Events(Writer):
    """The answer as a stream."""

    def __init__(self, answer: _Answer, prepared: Prepared) -> None:
        self._answer, self._reader = answer, prepared.new_reader(True)
        self._blocks = _OpenBlocks()
        self._is_open = False
        self._total = 0

    def feed(self, number: int, output: RequestOutput) -> str:
        (completion,) = output.outputs
        answer, blocks, events = self._answer, self._blocks, []
        is_finished = completion.finish_reason is not None
        if not self._is_open:
            self._is_open = True
            start = {**answer.head(), "content": [], "stop_reason": None, "stop_sequence": None}
            events.append(_event("message_start", message={**start, "usage": answer.usage(output, 0)}))
        for piece in [*self._reader.feed(completion.text), *(self._reader.finish() if is_finished else [])]:
            events += blocks.add(piece)
        self._total += num_generated(output)
        if completion.error is not None:
            events.append(_event("error", error={"type": "api_error", "message": completion.error}))
        elif is_finished:
            events += blocks.close()
            end = answer.end(output, blocks.has_calls)
            events.append(_event("message_delta", delta=end, usage=answer.usage(output, self._total)))
            events.append(_event("message_stop"))
        return "".join(events)

    async def end(self) -> str:
        return ""


class _OpenBlocks:
    """Blocks as a stream has them: one is open at most, and each has the next number."""

    def __init__(self) -> None:
        self._kind: str | None = None
        self._number = -1
        self.has_calls = False

    def add(self, piece: Piece) -> list[str]:
        events = []
        if piece.call is not None or piece.kind not in (self._kind, "arguments"):
            events += self.close()
            self._kind, self._number = piece.kind, self._number + 1
            call = piece.call
            empty = piece._replace(text="", call=None if call is None else call._replace(arguments="{}"))
            block = _block(empty)
            events.append(_event("content_block_start", index=self._number, content_block=block))
        if piece.call is not None or piece.kind == "arguments":
            self.has_calls = True
            text = piece.text if piece.call is None else piece.call.arguments
            delta = {"type": "input_json_delta", "partial_json": text}
        elif piece.kind == "reasoning":
            delta = {"type": "thinking_delta", "thinking": piece.text}
        else:
            delta = {"type": "text_delta", "text": piece.text}
        return [*events, _event("content_block_delta", index=self._number, delta=delta)]

    def close(self) -> list[str]:
        if self._kind is None:
            return []
        self._kind = None
        return [_event("content_block_stop", index=self._number)]
