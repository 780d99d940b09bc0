"""/inference/v1/generate: token ids in, token ids out, as vLLM has it, for trainers and gateways with own tokenizers.

Owns the route. Invariant: no text is made or read on the way, except where strings shall end an output.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.body import Body, read_body
from nanovllm.server.chat import DONE, take_stream_options
from nanovllm.server.events import Asked, EventStream, Writer, unless_gone
from nanovllm.server.sampling import IN_ORDER, take_sampling_params
from nanovllm.server.served import Served
from nanovllm.server.usage import LOWEST, num_generated, usage_of


async def generate(request: Request) -> Response:
    served: Served = request.app.state.served
    body = await read_body(request)
    served.check_model(body)
    is_stream = body.take("stream", bool, False)
    wants_usage = take_stream_options(body, is_stream)
    prompt = {"prompt_token_ids": body.require("token_ids", list)}
    name = body.take("request_id", str, request.state.request_id)
    params = _take_params(body.inner("sampling_params") or Body({}, "sampling_params."), is_stream)
    body.refuse("features", (), "this engine reads tokens alone")
    body.refuse("kv_transfer_params", ({},), "KV caches are not moved between engines")
    body.refuse("cache_salt", ("",), "the prefix cache is shared by all")
    body.refuse("priority", (0,), IN_ORDER)
    body.finish()
    if is_stream:
        return EventStream(served, [Asked(prompt, params, name)], _Chunks(params, name, wants_usage))
    with served.admitted(params.n):
        output = await unless_gone(request, served.final(prompt, params, name))
    if output is None:
        return Response(status_code=499)
    choices = [_choice(one, params.logprobs) for one in sorted(output.outputs, key=lambda one: one.index)]
    usage = usage_of([output], num_generated(output))
    return JSONResponse({"request_id": name, "choices": choices, "prompt_logprobs": _of_prompt(output), "usage": usage})


def _take_params(body: Body, is_stream: bool) -> SamplingParams:
    """SamplingParams by their own names and with their own defaults, not with the model's."""
    stop = body.look("stop", None)
    logprobs, prompt_logprobs = body.take("logprobs", int), body.take("prompt_logprobs", int)
    max_tokens = body.take("max_tokens", int, 16)
    params = take_sampling_params(
        body, SamplingParams(), max_tokens, is_stream,
        logprobs=logprobs, prompt_logprobs=prompt_logprobs, detokenize=bool(stop),
    )  # fmt: skip
    body.ignore("detokenize", "output_kind")  # the route says both
    body.finish()
    return params


class _Chunks(Writer):
    """The answer as a stream."""

    def __init__(self, params: SamplingParams, name: str, wants_usage: bool) -> None:
        self._params, self._wants_usage = params, wants_usage
        self._head = json.dumps({"request_id": name})[:-1]
        self._last: RequestOutput | None = None
        self._total = 0

    def feed(self, number: int, output: RequestOutput) -> str:
        of_prompt = ""
        if self._last is None and self._params.prompt_logprobs is not None:
            of_prompt = f', "prompt_logprobs": {json.dumps(_of_prompt(output))}'
        self._total, self._last = self._total + num_generated(output), output
        choices = [_choice(completion, self._params.logprobs) for completion in output.outputs]
        return f'data: {self._head}, "choices": {json.dumps(choices)}{of_prompt}}}\n\n'

    async def end(self) -> str:
        if not self._wants_usage or self._last is None:
            return DONE
        usage = json.dumps(usage_of([self._last], self._total))
        return f'data: {self._head}, "choices": [], "usage": {usage}}}\n\n{DONE}'


def _choice(completion: CompletionOutput, num_top: int | None) -> dict[str, Any]:
    return {
        "index": completion.index,
        "token_ids": completion.token_ids,
        "logprobs": None if num_top is None else {"content": _logprobs(completion, num_top)},
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        **({"error": completion.error} if completion.error is not None else {}),
    }


def _logprobs(completion: CompletionOutput, num_top: int) -> list[dict[str, Any]]:
    """In the form of chat completions, with ids for texts."""
    content = []
    for token_id, entries in zip(completion.token_ids, completion.logprobs or [], strict=True):
        most_likely = sorted(entries, key=lambda one: -entries[one].logprob)
        top = most_likely if num_top < 0 else most_likely[:num_top]
        content.append({**_entry(token_id, entries), "top_logprobs": [_entry(one, entries) for one in top]})
    return content


def _entry(token_id: int, entries: Mapping[int, Logprob]) -> dict[str, Any]:
    return {"token": f"token_id:{token_id}", "logprob": max(entries[token_id].logprob, LOWEST), "bytes": None}


def _of_prompt(output: RequestOutput) -> list[dict[int, dict[str, Any]] | None] | None:
    if output.prompt_logprobs is None:
        return None
    return [
        None if entries is None
        else {one: {**asdict(entry), "logprob": max(entry.logprob, LOWEST)} for one, entry in entries.items()}
        for entries in output.prompt_logprobs
    ]  # fmt: skip
