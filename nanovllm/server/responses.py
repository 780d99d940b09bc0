"""/v1/responses, as OpenAI has it: input of any of its items, an answer of items, whole or as events.

Owns the route's fields and the course of an answer; what goes in is read by `response_items`. Nothing is stored: a
conversation goes on by sending all of it again. Invariant: the items of a whole answer are those that the events of a
stream make, for they come about in the same way.
"""

import json
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nanovllm.outputs import RequestOutput
from nanovllm.server.body import Body, read_body
from nanovllm.server.conversation import Conversation, Prepared, take_template_variables
from nanovllm.server.events import Asked, EventStream, Writer, unless_gone
from nanovllm.server.reply import Piece, read_pieces
from nanovllm.server.response_items import ItemStream, take_function_tools, take_input
from nanovllm.server.sampling import take_sampling_params
from nanovllm.server.served import Served
from nanovllm.server.usage import num_generated
from nanovllm.structured_outputs import StructuredOutputsParams

_OF_NO_EFFECT = ("user", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")


async def responses(request: Request) -> Response:
    served: Served = request.app.state.served
    body = await read_body(request)
    name = served.check_model(body)
    is_stream = body.take("stream", bool, False)
    max_tokens = body.take("max_output_tokens", int)
    echoed = {
        "metadata": body.take("metadata", dict, {}),
        "instructions": body.take("instructions", str),
        "tools": body.look("tools", []),
        "tool_choice": body.look("tool_choice", "auto"),
        "parallel_tool_calls": body.look("parallel_tool_calls", True),
        "text": body.look("text", {"format": {"type": "text"}}),
        "reasoning": body.look("reasoning", None),
    }
    conversation = Conversation(
        take_input(body, echoed["instructions"]), _take_options(body), take_function_tools(body)
    )
    form = _take_form(body)
    _refuse_others(body, is_stream)
    params = take_sampling_params(body, served.defaults, max_tokens, is_stream, **form)
    body.ignore(*_OF_NO_EFFECT)
    body.finish()
    prepared = await conversation.prepare(served, params)
    answer = _Answer(served, name, request.state.request_id, prepared, echoed)
    if is_stream:
        return EventStream(served, [Asked(prepared.prompt, prepared.params, answer.id)], _Events(answer, prepared))
    with served.admitted(1):
        output = await unless_gone(request, served.final(prepared.prompt, prepared.params, answer.id))
    return Response(status_code=499) if output is None else JSONResponse(await answer.whole(output))


def _take_options(body: Body) -> dict[str, Any]:
    options = take_template_variables(body)
    reasoning = body.inner("reasoning")
    if reasoning is not None:
        effort = reasoning.take("effort", str)
        if effort is not None:  # the word for templates that know degrees, yes or no for those that do not
            options = {"reasoning_effort": effort, "enable_thinking": effort not in ("none", "minimal"), **options}
        reasoning.ignore("summary", "generate_summary")
        reasoning.finish()
    return options


def _take_form(body: Body) -> dict[str, StructuredOutputsParams]:
    text = body.inner("text")
    if text is None:
        return {}
    text.ignore("verbosity")
    form = text.inner("format")
    text.finish()
    if form is None:
        return {}
    kind = form.choose("type", ("text", "json_object", "json_schema"), "text")
    schema = form.require("schema", dict) if kind == "json_schema" else None
    form.ignore("name", "strict", "description")  # a form is always kept to
    form.finish()
    if kind == "json_object":
        return {"structured_outputs": StructuredOutputsParams(json_object=True)}
    return {} if schema is None else {"structured_outputs": StructuredOutputsParams(json=schema)}


def _refuse_others(body: Body, is_stream: bool) -> None:
    body.refuse("n", (1,), "a response is one answer")
    body.refuse("response_format", (), "its name is text.format here")
    for field in ("previous_response_id", "conversation", "prompt"):
        body.refuse(field, (), "nothing is stored here: send the whole conversation as input")
    body.refuse("background", (False,), "an answer goes to the client that waits for it")
    body.refuse("truncation", ("disabled",), "a conversation that is too long is refused")
    body.refuse("include", ([], ["reasoning.encrypted_content"]), "there is nothing of the kind")
    body.refuse("top_logprobs", (0,), "use chat completions for log-probabilities")
    body.refuse("max_tool_calls", (), "tools are the client's")
    options = body.inner("stream_options") if is_stream else None
    if options is not None:
        options.ignore("include_obfuscation")
        options.finish()


class _Answer:
    """The answer to one conversation."""

    def __init__(self, served: Served, model: str, request_id: str, prepared: Prepared, echoed: dict[str, Any]) -> None:
        self.id = f"resp_{request_id}"
        self._served, self._prepared = served, prepared
        params = prepared.params
        self._head = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            **echoed,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_output_tokens": params.max_tokens,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
        }

    def begun(self) -> dict[str, Any]:
        none = {"error": None, "incomplete_details": None, "usage": None}
        return {**self._head, "status": "in_progress", "output": [], **none}

    async def whole(self, output: RequestOutput) -> dict[str, Any]:
        items = ItemStream(self.id)
        pieces = read_pieces(self._prepared.new_reader(False), output.outputs[0].text)
        for piece in pieces:
            items.add(piece)
        items.close(_status(output))
        return await self.ended(items, pieces, output, num_generated(output))

    async def ended(
        self, items: ItemStream, pieces: Sequence[Piece], output: RequestOutput, num_generated: int
    ) -> dict[str, Any]:
        status, error = _status(output), output.outputs[0].error
        thoughts = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
        encode = partial(self._served.tokenizer.encode, thoughts, add_special_tokens=False)
        ids = await self._served.in_thread(encode) if thoughts else []
        num_prompt = len(output.prompt_token_ids)
        usage = {
            "input_tokens": num_prompt,
            "input_tokens_details": {"cached_tokens": output.num_cached_tokens},
            "output_tokens": num_generated,
            "output_tokens_details": {"reasoning_tokens": len(ids)},  # without the tags around them
            "total_tokens": num_prompt + num_generated,
        }
        return {
            **self._head,
            "status": status,
            "output": items.output,
            "error": None if error is None else {"code": "server_error", "message": error},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "usage": usage,
        }


class _Events(Writer):
    """The answer as a stream."""

    def __init__(self, answer: _Answer, prepared: Prepared) -> None:
        self._answer, self._reader = answer, prepared.new_reader(True)
        self._items = ItemStream(answer.id)
        self._pieces: list[Piece] = []
        self._last: RequestOutput | None = None
        self._total = self._sequence = 0

    def feed(self, number: int, output: RequestOutput) -> str:
        (completion,) = output.outputs
        is_finished = completion.finish_reason is not None
        events: list[dict[str, Any]] = []
        if self._last is None:
            kinds = ("response.created", "response.in_progress")
            events += [{"type": kind, "response": self._answer.begun()} for kind in kinds]
        pieces = [*self._reader.feed(completion.text), *(self._reader.finish() if is_finished else [])]
        for piece in pieces:
            events += self._items.add(piece)
        if is_finished:
            events += self._items.close(_status(output))
        self._pieces += pieces
        self._total += num_generated(output)
        self._last = output
        return self._written(events)

    async def end(self) -> str:
        assert self._last is not None
        response = await self._answer.ended(self._items, self._pieces, self._last, self._total)
        # A cut answer is "completed" too, with the status "incomplete" inside: the client's helper has no final
        # response after an event of another name.
        kind = "response.failed" if response["status"] == "failed" else "response.completed"
        return self._written([{"type": kind, "response": response}])

    def _written(self, events: list[dict[str, Any]]) -> str:
        lines = []
        for event in events:
            data = json.dumps({**event, "sequence_number": self._sequence})
            lines.append(f"event: {event['type']}\ndata: {data}\n\n")
            self._sequence += 1
        return "".join(lines)


def _status(output: RequestOutput) -> str:
    return {"stop": "completed", "length": "incomplete"}.get(output.outputs[0].finish_reason or "", "failed")
