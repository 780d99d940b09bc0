"""/v1/completions, as OpenAI has it: several prompts, texts or token ids, with echo and log-probabilities.

Owns the route's fields and the shape of its answers. Invariant: choice i * n + j is the j-th output of prompt i.
"""

import asyncio
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.server.body import BadRequest, Body, read_body
from nanovllm.server.chat import DONE, take_stream_options
from nanovllm.server.events import Asked, EventStream, Writer, quoted, unless_gone
from nanovllm.server.sampling import IN_ORDER, take_sampling_params
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
    only_echo = echo and max_tokens == 0
    prompt_logprobs = num_top if echo and num_top is not None else None
    params = take_sampling_params(
        body, served.defaults, max(max_tokens, 1) if only_echo else max_tokens, is_stream,
        logprobs=num_top, prompt_logprobs=prompt_logprobs,
    )  # fmt: skip
    body.refuse("suffix", ("",), "text can only be continued")
    body.refuse("best_of", (1, params.n), "all choices are returned")
    body.refuse("priority", (0,), IN_ORDER)
    body.ignore("user")
    body.finish()
    answer = _Answer(name, request.state.request_id, num_top, params.n)
    asked = [Asked(prompt, params, answer.id_of(i, len(prompts))) for i, prompt in enumerate(prompts)]
    if is_stream:
        text_of_prompt = partial(_echo, served) if echo else None
        return EventStream(served, asked, _Chunks(answer, wants_usage, text_of_prompt, only_echo))
    with served.admitted(len(prompts) * params.n):
        outputs = await unless_gone(request, _all_of(served, asked))
    if outputs is None:
        return Response(status_code=499)
    texts = await served.in_thread(lambda: [_echo(served, one) for one in outputs]) if echo else [""] * len(outputs)
    return JSONResponse(answer.whole(outputs, texts, echo, only_echo))


def take_prompts(body: Body, name: str) -> list[Any]:
    """One or several prompts, texts or lists of token ids, out of the field `name`."""
    prompt = body.require(name, (str, list))
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [_as_prompt(prompt)]
    if not prompt or len(prompt) > _MAX_PROMPTS:
        raise BadRequest(f"{name} holds {len(prompt)} prompts; give 1 to {_MAX_PROMPTS}", param=name)
    return [_as_prompt(item) for item in prompt]


def _as_prompt(item: Any) -> Any:
    return {"prompt_token_ids": item} if isinstance(item, list) else item


def _echo(served: Served, output: RequestOutput) -> str:
    """The text of a prompt."""
    return output.prompt if output.prompt is not None else str(served.tokenizer.decode(output.prompt_token_ids))


class _Answer:
    """The answer to one body."""

    def __init__(self, model: str, request_id: str, num_top: int | None, n: int) -> None:
        self.id = f"cmpl-{request_id}"
        self.head = {"id": self.id, "object": "text_completion", "created": int(time.time()), "model": model}
        self.num_top, self.n = num_top, n

    def id_of(self, number: int, num_prompts: int) -> str:
        return self.id if num_prompts == 1 else f"{self.id}-{number}"

    def whole(self, outputs: list[RequestOutput], texts: list[str], echo: bool, only_echo: bool) -> dict[str, Any]:
        choices = []
        for i, (output, text) in enumerate(zip(outputs, texts, strict=True)):
            for completion in sorted(output.outputs, key=lambda completion: completion.index):
                logprobs = self.logprobs(output if echo else None, None if only_echo else completion)
                choices.append(
                    {
                        "index": i * self.n + completion.index,
                        "text": text + ("" if only_echo else completion.text),
                        "logprobs": logprobs,
                        "finish_reason": "length" if only_echo else completion.finish_reason,
                        **({"error": completion.error} if completion.error is not None else {}),
                    }
                )
        count = 0 if only_echo else sum(map(num_generated, outputs))
        return {**self.head, "choices": choices, "usage": usage_of(outputs, count)}

    def logprobs(self, prompt: RequestOutput | None, completion: CompletionOutput | None) -> dict[str, Any] | None:
        if self.num_top is None:
            return None
        token_ids: list[int] = []
        entries: list[Any] = []
        if prompt is not None:
            token_ids += prompt.prompt_token_ids
            entries += prompt.prompt_logprobs or [None] * len(prompt.prompt_token_ids)
        if completion is not None:
            token_ids += completion.token_ids
            entries += completion.logprobs or []
        return completion_logprobs(token_ids, entries, self.num_top)


class _Chunks(Writer):
    """The answer as a stream."""

    grows = True

    def __init__(
        self,
        answer: _Answer,
        wants_usage: bool,
        text_of_prompt: Callable[[RequestOutput], str] | None,
        only_echo: bool,
    ) -> None:
        """text_of_prompt: where each choice begins with its prompt."""
        self._answer, self._wants_usage = answer, wants_usage
        self._text_of_prompt, self._only_echo = text_of_prompt, only_echo
        self._head = json.dumps(answer.head)[:-1]
        self._last: dict[int, RequestOutput] = {}
        self._offsets: dict[int, int] = {}
        self._total = 0

    def grow(self, number: int, text: str, num_tokens: int) -> str:
        self._total += num_tokens
        choice = f'{{"index": {number}, "text": {quoted(text)}, "logprobs": null, "finish_reason": null}}'
        return f'data: {self._head}, "choices": [{choice}]}}\n\n'

    def feed(self, number: int, output: RequestOutput) -> str:
        lines, num_top = [], self._answer.num_top
        if self._text_of_prompt is not None and number not in self._last:
            lines += self._echoes(number, output, self._text_of_prompt(output))
        self._last[number] = output
        for completion in () if self._only_echo else output.outputs:
            index = number * self._answer.n + completion.index
            logprobs = None
            if num_top is not None:
                offset = self._offsets.get(index, 0)
                logprobs = completion_logprobs(completion.token_ids, completion.logprobs or [], num_top, offset)
                self._offsets[index] = offset + len(completion.text)
            self._total += len(completion.token_ids)
            lines.append(f'data: {self._head}, "choices": [{_choice(index, completion, logprobs)}]}}\n\n')
        return "".join(lines)

    def _echoes(self, number: int, output: RequestOutput, text: str) -> list[str]:
        """The prompt, as the first chunk of each of its choices."""
        echo = CompletionOutput(text=text, finish_reason="length" if self._only_echo else None)
        logprobs = self._answer.logprobs(output, None)
        indices = range(number * self._answer.n, (number + 1) * self._answer.n)
        if logprobs is not None:
            self._offsets.update(dict.fromkeys(indices, sum(map(len, logprobs["tokens"]))))
        return [f'data: {self._head}, "choices": [{_choice(index, echo, logprobs)}]}}\n\n' for index in indices]

    async def end(self) -> str:
        if not self._wants_usage:
            return DONE
        usage = usage_of([self._last[number] for number in sorted(self._last)], self._total)
        return f'data: {self._head}, "choices": [], "usage": {json.dumps(usage)}}}\n\n{DONE}'


def _choice(index: int, completion: CompletionOutput, logprobs: dict[str, Any] | None) -> str:
    """A choice of a chunk as JSON, put together by hand: it is made for each token."""
    ending = "null" if completion.finish_reason is None else json.dumps(completion.finish_reason)
    if completion.error is not None:
        ending += f', "error": {json.dumps(completion.error)}'
    text, entries = quoted(completion.text), "null" if logprobs is None else json.dumps(logprobs)
    return f'{{"index": {index}, "text": {text}, "logprobs": {entries}, "finish_reason": {ending}}}'


async def _all_of(served: Served, asked: list[Asked]) -> list[RequestOutput]:
    """The final output of each prompt. If one is bad the others are cancelled."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(served.final(*one)) for one in asked]
    return [task.result() for task in tasks]
