"""/v1/chat/completions, as OpenAI has it and its clients read it.

Owns the route's fields and the shape of its answers. Invariant: in a stream every choice has an opening chunk first,
in order, and a closing one with its reason; usage, if asked for, is a chunk of its own behind all of them.
"""

import json
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.server.body import BadRequest, Body, read_body
from nanovllm.server.conversation import Conversation, Prepared, take_template_variables
from nanovllm.server.events import Asked, EventStream, Writer, quoted, unless_gone
from nanovllm.server.reply import Call, Piece, PlainReader, Reader, Reply, read_whole
from nanovllm.server.sampling import IN_ORDER, take_sampling_params
from nanovllm.server.served import Served
from nanovllm.server.tools import take_tools
from nanovllm.server.usage import chat_logprobs, num_generated, usage_of

DONE = "data: [DONE]\n\n"
_OPENING = '{"role": "assistant", "content": ""}'
_OF_NO_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")


async def chat_completions(request: Request) -> Response:
    served: Served = request.app.state.served
    body = await read_body(request)
    name = served.check_model(body)
    is_stream = body.take("stream", bool, False)
    wants_usage = take_stream_options(body, is_stream)
    num_top = _take_logprobs(body)
    max_tokens = body.take("max_completion_tokens", int) or body.take("max_tokens", int)
    params = take_sampling_params(body, served.defaults, max_tokens, is_stream, logprobs=num_top)
    conversation = _take_conversation(body)
    body.refuse("priority", (0,), IN_ORDER)
    body.ignore(*_OF_NO_EFFECT)
    body.finish()
    prepared = await conversation.prepare(served, params)
    answer = _Answer(name, request.state.request_id, num_top or 0, prepared)
    if is_stream:
        asked = Asked(prepared.prompt, prepared.params, answer.id)
        return EventStream(served, [asked], _Chunks(answer, prepared, wants_usage))
    with served.admitted(params.n):
        output = await unless_gone(request, served.final(prepared.prompt, prepared.params, answer.id))
    return Response(status_code=499) if output is None else JSONResponse(answer.whole(output))


def take_stream_options(body: Body, is_stream: bool) -> bool:
    """Whether a stream ends with its usage."""
    options = body.inner("stream_options")
    if options is None:
        return False
    if not is_stream:
        raise BadRequest("stream_options is for stream=true", param="stream_options")
    wants_usage: bool = options.take("include_usage", bool, False)
    options.ignore("include_obfuscation", "continuous_usage_stats")
    options.finish()
    return wants_usage


def _take_logprobs(body: Body) -> int | None:
    is_asked, num_top = body.take("logprobs", bool, False), body.take("top_logprobs", int)
    if num_top is not None and not is_asked:
        raise BadRequest("top_logprobs needs logprobs=true", param="top_logprobs")
    return (num_top or 0) if is_asked else None


def _take_conversation(body: Body) -> Conversation:
    messages: list[Any] = body.require("messages", list)
    options = take_template_variables(body)
    for field, kind in (("add_generation_prompt", bool), ("continue_final_message", bool), ("chat_template", str)):
        value = body.take(field, kind)
        if value is not None:
            options[field] = value
    if options.get("continue_final_message"):
        options.setdefault("add_generation_prompt", False)
    return Conversation(messages, options, take_tools(body))


def _choice(index: int, delta: str, logprobs: Any = None, reason: str | None = None, error: str | None = None) -> str:
    """A choice of a chunk as JSON, put together by hand: it is made for each token. delta: JSON too."""
    ending = "null" if reason is None else json.dumps(reason)
    if error is not None:
        ending += f', "error": {json.dumps(error)}'
    entries = "null" if logprobs is None else json.dumps(logprobs)
    return f'{{"index": {index}, "delta": {delta}, "logprobs": {entries}, "finish_reason": {ending}}}'


def _content(text: str) -> str:
    return f'{{"content": {quoted(text)}}}'


def _message(reply: Reply) -> dict[str, Any]:
    content = reply.content if reply.content or not (reply.calls or reply.reasoning) else None
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if reply.reasoning:
        message |= _reasoning(reply.reasoning)
    if reply.calls:
        message["tool_calls"] = [_call(call) for call in reply.calls]
    return message


def _reasoning(text: str) -> dict[str, str]:
    """Under vLLM's name, and under the one that it had before, which some clients read."""
    return {"reasoning": text, "reasoning_content": text}


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _reason(completion: CompletionOutput, has_calls: bool) -> str | None:
    return "tool_calls" if has_calls and completion.finish_reason == "stop" else completion.finish_reason


class _Answer:
    """The answer to one conversation."""

    def __init__(self, model: str, request_id: str, num_top: int, prepared: Prepared) -> None:
        self.id = f"chatcmpl-{request_id}"
        self.head = {"id": self.id, "created": int(time.time()), "model": model}
        self.num_top, self._prepared = num_top, prepared

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        choices = []
        for completion in sorted(output.outputs, key=lambda completion: completion.index):
            reply = read_whole(self._prepared.new_reader(False), completion.text)
            choices.append(
                {
                    "index": completion.index,
                    "message": _message(reply),
                    "logprobs": chat_logprobs(completion, self.num_top),
                    "finish_reason": _reason(completion, bool(reply.calls)),
                    **({"error": completion.error} if completion.error is not None else {}),
                }
            )
        usage = usage_of([output], num_generated(output))
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage}


class _Chunks(Writer):
    """The answer as a stream."""

    def __init__(self, answer: _Answer, prepared: Prepared, wants_usage: bool) -> None:
        self._head = json.dumps({**answer.head, "object": "chat.completion.chunk"})[:-1]
        self._wants_usage = wants_usage
        self._readers = [_ChoiceReader(i, prepared.new_reader(True), answer.num_top) for i in range(prepared.params.n)]
        self.grows = self._readers[0].is_plain
        self._last: RequestOutput | None = None
        self._total = 0

    def grow(self, number: int, text: str, num_tokens: int) -> str:
        self._total += num_tokens
        return f'data: {self._head}, "choices": [{_choice(0, _content(text))}]}}\n\n' if text else ""

    def feed(self, number: int, output: RequestOutput) -> str:
        choices = []
        if self._last is None:
            choices += [_choice(i, _OPENING) for i in range(len(self._readers))]
        for completion in output.outputs:
            choices += self._readers[completion.index].read(completion)
            self._total += len(completion.token_ids)
        self._last = output
        return "".join([f'data: {self._head}, "choices": [{choice}]}}\n\n' for choice in choices])

    async def end(self) -> str:
        if not self._wants_usage or self._last is None:
            return DONE
        usage = json.dumps(usage_of([self._last], self._total))
        return f'data: {self._head}, "choices": [], "usage": {usage}}}\n\n{DONE}'


class _ChoiceReader:
    """What one choice sends of each output."""

    def __init__(self, index: int, reader: Reader, num_top: int) -> None:
        self._index, self._reader, self._num_top = index, reader, num_top
        self.is_plain = isinstance(reader, PlainReader)
        self._num_calls = 0

    def read(self, completion: CompletionOutput) -> list[str]:
        """The choices of the chunks that an output makes."""
        pieces = self._reader.feed(completion.text)
        is_finished = completion.finish_reason is not None
        if is_finished:
            pieces += self._reader.finish()
        deltas = [self._delta(piece) for piece in pieces]
        logprobs = chat_logprobs(completion, self._num_top)
        if logprobs is not None and not deltas:
            deltas = ['{"content": ""}']
        # An output's log-probabilities go with its first piece: pieces are no whole tokens.
        choices = [_choice(self._index, delta, logprobs if i == 0 else None) for i, delta in enumerate(deltas)]
        if is_finished:
            reason = _reason(completion, self._num_calls > 0)
            choices.append(_choice(self._index, "{}", None, reason, completion.error))
        return choices

    def _delta(self, piece: Piece) -> str:
        if piece.kind == "content":
            return _content(piece.text)
        if piece.kind == "reasoning":
            return json.dumps(_reasoning(piece.text))
        if piece.call is None:
            more = {"index": self._num_calls - 1, "function": {"arguments": piece.text}}
            return json.dumps({"tool_calls": [more]})
        self._num_calls += 1
        return json.dumps({"tool_calls": [{"index": self._num_calls - 1, **_call(piece.call)}]})
