"""OpenAI's batch files: a request for the HTTP API on each line, and its response on a line of OUT.

Owns the form of lines; what a request means is the server's business, which is called here without a network.
Invariant: a response depends on its line alone. So ids come from the row's number, `created` is 0, and a request
without a seed gets the row's.
"""

import asyncio
import json
import sys
from collections.abc import Mapping
from typing import Any

from nanovllm.async_llm import AsyncLLM
from nanovllm.batch.columns import row_seed
from nanovllm.batch.tables import Row
from nanovllm.errors import brief
from nanovllm.server.app import make_app
from nanovllm.server.served import Served

URLS = ("/v1/chat/completions", "/v1/completions")
_ENGINE_IS_GONE = 503


class OpenAILinesJob:
    def __init__(self, engine: AsyncLLM, names: list[str]) -> None:
        """names: what lines may call the model."""
        self._engine = engine
        self._app = make_app(Served(engine, names, max_unfinished=sys.maxsize))  # the job has its own bound

    async def answer(self, row: Row) -> dict[str, Any]:
        identity: dict[str, Any] = {"id": f"batch_req_{row.number}", "custom_id": row.fields.get("custom_id")}
        try:
            url, body = _read(row)
        except ValueError as error:
            return {**identity, "response": None, "error": {"code": "invalid_request", "message": str(error)}}
        if body.get("seed") is None:
            body["seed"] = row_seed(self._engine, row)
        status, answer = await self._post(url, json.dumps(body).encode(), str(row.number))
        if status == _ENGINE_IS_GONE:  # that is no row's fault: the job ends, and the row is computed when it goes on
            raise RuntimeError(answer["error"]["message"])
        _forget_the_hour(answer, row.number)
        response = {"status_code": status, "request_id": str(row.number), "body": answer}
        return {**identity, "response": response, "error": None}

    def merge(self, row: Row, result: Mapping[str, Any]) -> dict[str, Any]:
        return dict(result)

    async def _post(self, url: str, body: bytes, request_id: str) -> tuple[int, Any]:
        """Status and JSON of the server's response."""
        parts: list[bytes] = []
        status = 0
        is_sent = False

        async def receive() -> dict[str, Any]:
            nonlocal is_sent
            if is_sent:
                await asyncio.Event().wait()  # this client never goes away
            is_sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            parts.append(message.get("body", b""))

        headers = [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())]
        scope = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": url}
        await self._app({**scope, "query_string": b"", "root_path": "", "headers": headers}, receive, send)  # type: ignore[arg-type]
        return status, json.loads(b"".join(parts))


def _read(row: Row) -> tuple[str, dict[str, Any]]:
    if row.problem is not None:
        raise ValueError(row.problem)
    method, url, body = (row.fields.get(name) for name in ("method", "url", "body"))
    if method != "POST" or url not in URLS:
        raise ValueError(f"a line may POST to {' or '.join(URLS)}, got {brief(method)} {brief(url)}")
    if not isinstance(body, dict):
        raise ValueError(f"body must be an object, got {brief(body)}")
    if body.get("stream"):
        raise ValueError("stream is not for batches: the response is one line")
    return url, dict(body)


def _forget_the_hour(answer: dict[str, Any], number: int) -> None:
    """Put in place of times and random ids what is the same in every run."""
    if "created" in answer:
        answer["created"] = 0
    for choice in answer.get("choices", []):
        calls = choice.get("message", {}).get("tool_calls", [])
        for i, call in enumerate(calls):
            call["id"] = f"call_{number}_{choice['index']}_{i}"
