"""/score and /v1/score in vLLM's form: how likely the model finds texts behind others, as `LLM.score` has it.

Owns the route. Invariant: `score` is the log-likelihood of text_2 behind text_1, the sum of its tokens' natural
logarithms, and does not depend on the other pairs.
"""

import asyncio
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nanovllm.engine.input_processor import Prompt
from nanovllm.scoring import SCORE_PARAMS, check_options, log_likelihood, read_continuation, scoring_of
from nanovllm.server.adapters import asked_for
from nanovllm.server.body import BadRequest, Body, checking, read_body
from nanovllm.server.events import unless_gone
from nanovllm.server.served import Served

_MOST_PAIRS = 2048


async def score(request: Request) -> Response:
    served: Served = request.app.state.served
    body = await read_body(request)
    name = served.check_model(body)
    pairs = _take_pairs(body)
    body.ignore("user")
    body.finish()
    with served.admitted(len(pairs)):
        scored = await unless_gone(request, _score_all(served, pairs, f"score-{request.state.request_id}"))
    if scored is None:
        return Response(status_code=499)
    data = [{"index": i, "object": "score", "score": value} for i, (value, _) in enumerate(scored)]
    num_tokens = sum(count for _, count in scored)
    return JSONResponse(
        {
            "id": f"score-{request.state.request_id}",
            "object": "list",
            "created": int(time.time()),
            "model": name,
            "data": data,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0},
        }
    )


def _take_pairs(body: Body) -> list[tuple[str, str]]:
    """One text before one or several, or as many before as behind."""
    befores, behinds = (_take_texts(body, name) for name in ("text_1", "text_2"))
    if len(befores) == 1:
        befores *= len(behinds)
    if len(befores) != len(behinds):
        raise BadRequest(
            f"text_1 holds {len(befores)} texts and text_2 {len(behinds)}: give one, or as many", param="text_1"
        )
    return list(zip(befores, behinds, strict=True))


def _take_texts(body: Body, name: str) -> list[str]:
    given = body.require(name, (str, list))
    texts = [given] if isinstance(given, str) else given
    if not 1 <= len(texts) <= _MOST_PAIRS or not all(isinstance(text, str) for text in texts):
        raise BadRequest(f"{name} must be a text or a list of 1 to {_MOST_PAIRS} texts", param=name)
    with checking(name):
        check_options(texts)
    return texts


async def _score_all(served: Served, pairs: list[tuple[str, str]], request_id: str) -> list[tuple[float, int]]:
    """Of each pair its score and tokens. If one is bad the others are cancelled."""

    async def score_one(i: int, before: str, behind: str) -> tuple[float, int]:
        prefix_ids, option_ids = await served.in_thread(_token_ids, served, before, behind)
        prompt: Prompt = prefix_ids + option_ids
        with checking():
            handle = await served.engine.check(prompt, SCORE_PARAMS, f"{request_id}-{i}", asked_for.get())
        (sequence,) = handle.requests
        scoring_of(sequence).skip(len(prefix_ids) - 1)
        async for _ in served.engine.outputs(handle):
            pass
        return log_likelihood(sequence), len(prompt)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(score_one(i, *pair)) for i, pair in enumerate(pairs)]
    return [task.result() for task in tasks]


def _token_ids(served: Served, before: str, behind: str) -> tuple[list[Any], list[Any]]:
    processor = served.engine.llm._input_processor
    with checking():
        return processor.read_prompt(before, "text_1"), read_continuation(processor, behind, "text_2")
