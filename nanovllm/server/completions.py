"""/v1/completions, as OpenAI has it: several prompts, texts or token ids, with echo and log-probabilities.

Owns the route's fields and the shape of its answers. Invariant: choice i * n + j is the j-th output of prompt i.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.body import BadRequest, Body, read_body
from nanovllm.server.chat import DONE, take_stream_options
from nanovllm.server.events import stream_events, unless_gone
from nanovllm.server.sampling import take_sampling_params
from nanovllm.server.served import Served
from nanovllm.server.usage import completion_logprobs, num_generated, usage_of

_MAX_PROMPTS = 2048  # of one body


async def completions(request: Request) -> Response:
    served: Served = request.app.state.served
    body = await read_body(request)
    name = served.check_model(body)
    is_stream = body.take("stream", bool, False)
    wants_usage = take_stream_options(body, is_stream)
    prompts = take_prompts(body, "prompt")
    echo: bool = body.take("echo", bool, False)
    num_top: int | None = body.take("logprobs", int)
    max_tokens: int = body.take("max_tokens", int, 16)
    if echo and is_stream:
        raise BadRequest("echo is not supported with stream=true: the prompt is the client's own", param="echo")
    only_echo = echo and max_tokens == 0
    prompt_logprobs = num_top if echo and num_top is not None else None
    params = take_sampling_params(
        body, served.defaults, max(max_tokens, 1) if only_echo else max_tokens, is_stream,
        logprobs=num_top, prompt_logprobs=prompt_logprobs,
    )  # fmt: skip
    body.refuse("suffix", ("",), "text can only be continued")
    body.refuse("best_of", (1, params.n), "all choices are returned")
    body.ignore("user")
    body.finish()
    answer = _Answer(name, request.state.request_id, num_top, params.n)
    if is_stream:
        return await stream_events(answer.stream(served, prompts, params, wants_usage))
    with served.admitted(len(prompts) * params.n):
        outputs = await unless_gone(request, answer.all_of(served, prompts, params))
    if outputs is None:
        return Response(status_code=499)
    texts = await served.in_thread(_echoes, served, outputs) if echo else [""] * len(outputs)
    return JSONResponse(answer.whole(outputs, texts, echo, only_echo))


def take_prompts(body: Body, name: str) -> list[Any]:
    """One or several prompts, texts or lists of token ids, out of the field `name`."""
    prompt = body.require(name, (str, list))
    if isinstance(prompt, str) or (prompt and all(isinstance(item, int) for item in prompt)):
        return [_as_prompt(prompt)]
    if not prompt or len(prompt) > _MAX_PROMPTS:
        raise BadRequest(f"{name} holds {len(prompt)} prompts; give 1 to {_MAX_PROMPTS}", param=name)
    return [_as_prompt(item) for item in prompt]


def _as_prompt(item: Any) -> Any:
    return {"prompt_token_ids": item} if isinstance(item, list) else item


def _echoes(served: Served, outputs: list[RequestOutput]) -> list[str]:
    return [
        output.prompt if output.prompt is not None else served.tokenizer.decode(output.prompt_token_ids)
        for output in outputs
    ]


class _Answer:
    """The answer to one body, whole or in chunks."""

    def __init__(self, model: str, request_id: str, num_top: int | None, n: int) -> None:
        self.id = f"cmpl-{request_id}"
        self._head = {"id": self.id, "object": "text_completion", "created": int(time.time()), "model": model}
        self._num_top, self._n = num_top, n

    async def all_of(self, served: Served, prompts: list[Any], params: SamplingParams) -> list[RequestOutput]:
        """The final output of each prompt. If one is bad the others are cancelled."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(served.final(prompt, params, f"{self.id}-{i}")) for i, prompt in enumerate(prompts)
            ]
        return [task.result() for task in tasks]

    def whole(self, outputs: list[RequestOutput], texts: list[str], echo: bool, only_echo: bool) -> dict[str, Any]:
        choices = []
        for i, (output, text) in enumerate(zip(outputs, texts, strict=True)):
            for completion in sorted(output.outputs, key=lambda completion: completion.index):
                logprobs = self._logprobs(output if echo else None, None if only_echo else completion)
                choices.append(
                    {
                        "index": i * self._n + completion.index,
                        "text": text + ("" if only_echo else completion.text),
                        "logprobs": logprobs,
                        "finish_reason": "length" if only_echo else completion.finish_reason,
                        **({"error": completion.error} if completion.error is not None else {}),
                    }
                )
        count = 0 if only_echo else sum(map(num_generated, outputs))
        return {**self._head, "choices": choices, "usage": usage_of(outputs, count)}

    def _logprobs(self, prompt: RequestOutput | None, completion: CompletionOutput | None) -> dict[str, Any] | None:
        if self._num_top is None:
            return None
        token_ids: list[int] = []
        entries: list[Any] = []
        if prompt is not None:
            token_ids += prompt.prompt_token_ids
            entries += prompt.prompt_logprobs or [None] * len(prompt.prompt_token_ids)
        if completion is not None:
            token_ids += completion.token_ids
            entries += completion.logprobs or []
        return completion_logprobs(token_ids, entries, self._num_top)

    async def stream(
        self, served: Served, prompts: list[Any], params: SamplingParams, wants_usage: bool
    ) -> AsyncIterator[str]:
        head = json.dumps(self._head)[:-1]
        places = {f"{self.id}-{i}": i for i in range(len(prompts))} if len(prompts) > 1 else {self.id: 0}
        last: dict[int, RequestOutput] = {}
        offsets: dict[int, int] = {}
        total = 0
        with served.admitted(len(prompts) * params.n):
            async for output in _outputs(served, prompts, params, self.id):
                i = places[output.request_id]
                lines = []
                for completion in output.outputs:
                    index = i * self._n + completion.index
                    logprobs = None
                    if self._num_top is not None:
                        logprobs = completion_logprobs(
                            completion.token_ids, completion.logprobs or [], self._num_top, offsets.get(index, 0)
                        )
                        offsets[index] = offsets.get(index, 0) + len(completion.text)
                    lines.append(f'data: {head}, "choices": [{_choice(index, completion, logprobs)}]}}\n\n')
                total, last[i] = total + num_generated(output), output
                if lines:
                    yield "".join(lines)
            if wants_usage:
                usage = usage_of([last[i] for i in sorted(last)], total)
                yield f'data: {head}, "choices": [], "usage": {json.dumps(usage)}}}\n\n'
            yield DONE


def _choice(index: int, completion: CompletionOutput, logprobs: dict[str, Any] | None) -> str:
    """A choice of a chunk as JSON, put together by hand: it is made for each token."""
    ending = "null" if completion.finish_reason is None else json.dumps(completion.finish_reason)
    if completion.error is not None:
        ending += f', "error": {json.dumps(completion.error)}'
    text, entries = json.dumps(completion.text), "null" if logprobs is None else json.dumps(logprobs)
    return f'{{"index": {index}, "text": {text}, "logprobs": {entries}, "finish_reason": {ending}}}'


def _outputs(
    served: Served, prompts: list[Any], params: SamplingParams, request_id: str
) -> AsyncIterator[RequestOutput]:
    if len(prompts) == 1:
        return served.run(prompts[0], params, request_id)
    return _merged(served, prompts, params, request_id)


async def _merged(
    served: Served, prompts: list[Any], params: SamplingParams, request_id: str
) -> AsyncIterator[RequestOutput]:
    """Outputs of several prompts as they come."""
    queue: asyncio.Queue[RequestOutput | BaseException | None] = asyncio.Queue(len(prompts))

    async def pump(i: int, prompt: Any) -> None:
        try:
            async for output in served.run(prompt, params, f"{request_id}-{i}"):
                await queue.put(output)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(pump(i, prompt)) for i, prompt in enumerate(prompts)]
    try:
        num_left = len(tasks)
        while num_left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
