"""Server-sent events, written straight to the ASGI server, and the end of a request whose client has gone away.

Owns both. Events go to the server's own `send`, past the layers around a route: these look at heads only, and each of
them costs a microsecond a token. A stream that cannot go on ends with an error event. Invariant: when the client goes,
the iterator that makes the answer is left at once, wherever it waits; that is what frees the request's rows and blocks
(`AsyncLLM.generate`).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanovllm.server.errors import error_event, fault_of

Result = TypeVar("Result")

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies pass each event on as it comes
]


class EventStream(Response):
    """events: texts of whole events. The status is sent with the first, so that an error before it has its own."""

    def __init__(self, events: AsyncIterator[str], first: str) -> None:
        self._events, self._first = events, first
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [*_HEADERS, *scope.get("state", {}).get("headers", [])]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _until_gone(receive, self._write(scope.get("state", {}).get("server_send", send), Request(scope)))

    async def _write(self, send: Send, request: Request) -> None:
        await send({"type": "http.response.body", "body": self._first.encode(), "more_body": True})
        end = b""
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        except Exception as error:
            fault = fault_of(error, request.app.state.served, request.state.request_id)
            end = error_event(request.url.path, fault).encode()
        await send({"type": "http.response.body", "body": end, "more_body": False})


async def stream_events(events: AsyncIterator[str]) -> EventStream:
    """The response that sends these. Raises what the first raises."""
    return EventStream(events, await anext(events))


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """What `work` returns, or None, and work cancelled, if the client goes away before."""
    return await _until_gone(request.receive, work)


async def _until_gone(receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, Result]) -> Result | None:
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
                with suppress(asyncio.CancelledError):
                    await one


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
