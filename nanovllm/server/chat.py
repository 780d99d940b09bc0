"""/v1/chat/completions, as OpenAI has it and its clients read it.

Owns the route's fields and the shape of its answers. Invariant: in a stream every choice has an opening chunk first,
in order, and a closing one with its reason; usage, if asked for, is a chunk of its own behind all of them.
"""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.body import BadRequest, Body, read_body
from nanovllm.server.events import stream_events, unless_gone
from nanovllm.server.sampling import take_sampling_params
from nanovllm.server.served import Served
from nanovllm.server.usage import chat_logprobs, num_generated, usage_of

DONE = "data: [DONE]\n\n"
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
    render = _take_conversation(body)
    body.ignore(*_OF_NO_EFFECT)
    body.finish()
    prompt = await served.in_thread(render, served.tokenizer)
    answer = _Answer(name, request.state.request_id, num_top or 0, params.n)
    if is_stream:
        return await stream_events(answer.stream(served, prompt, params, wants_usage))
    with served.admitted(1):
        output = await unless_gone(request, served.final(prompt, params, answer.id))
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


def _take_conversation(body: Body) -> Any:
    """A function of the tokenizer that makes the prompt; rendering takes a while, and belongs in a thread."""
    messages: list[Any] = body.require("messages", list)
    options: dict[str, Any] = dict(body.take("chat_template_kwargs", dict, {}))
    for field, kind in (("add_generation_prompt", bool), ("continue_final_message", bool), ("chat_template", str)):
        value = body.take(field, kind)
        if value is not None:
            options[field] = value
    if options.get("continue_final_message"):
        options.setdefault("add_generation_prompt", False)
    body.refuse("tools", ([],), "this server reads no tool calls yet")
    body.refuse("tool_choice", ("none", "auto"), "this server reads no tool calls yet")
    body.ignore("parallel_tool_calls")

    def render(tokenizer: Any) -> dict[str, Any]:
        text = tokenizer.render_chat(messages, **options)
        return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}

    return render


def _choice(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


class _Answer:
    """The answer to one conversation, whole or in chunks."""

    def __init__(self, model: str, request_id: str, num_top: int, n: int) -> None:
        self.id = f"chatcmpl-{request_id}"
        self._head = {"id": self.id, "created": int(time.time()), "model": model}
        self._num_top, self._n = num_top, n

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        choices = [
            {
                "index": completion.index,
                "message": {"role": "assistant", "content": completion.text, "refusal": None},
                "logprobs": chat_logprobs(completion, self._num_top),
                "finish_reason": completion.finish_reason,
                **({"error": completion.error} if completion.error is not None else {}),
            }
            for completion in sorted(output.outputs, key=lambda completion: completion.index)
        ]
        usage = usage_of([output], num_generated(output))
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    async def stream(
        self, served: Served, prompt: Any, params: SamplingParams, wants_usage: bool
    ) -> AsyncIterator[str]:
        head = json.dumps({**self._head, "object": "chat.completion.chunk"})[:-1]

        def chunk(choice: dict[str, Any]) -> str:
            return f'data: {head}, "choices": [{json.dumps(choice)}]}}\n\n'

        with served.admitted(1):
            total, last, is_open = 0, None, False
            async for output in served.run(prompt, params, self.id):
                choices = []
                if not is_open:
                    is_open = True
                    choices += [_choice(i, {"role": "assistant", "content": ""}) for i in range(self._n)]
                for completion in output.outputs:
                    if completion.text or completion.logprobs:
                        logprobs = chat_logprobs(completion, self._num_top)
                        choices.append(_choice(completion.index, {"content": completion.text}, logprobs))
                    if completion.finish_reason is not None:
                        error = {"error": completion.error} if completion.error is not None else {}
                        choices.append({**_choice(completion.index, {}, None, completion.finish_reason), **error})
                total, last = total + num_generated(output), output
                if choices:
                    yield "".join(map(chunk, choices))
            if wants_usage and last is not None:
                yield f'data: {head}, "choices": [], "usage": {json.dumps(usage_of([last], total))}}}\n\n'
            yield DONE
