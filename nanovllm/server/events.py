"""Server-sent events: from what a client asked for to the last of them, and the end of a request whose client has gone.

Owns when events are written. Each step of the engine calls for every stream that it has news of; where the socket has
room they are written there and then, past tasks, generators and ASGI's `send`, which cost more than the rest of an
event. Where it has none, or the head is not sent, what comes is one event later. Invariant: when the client goes, its
requests are left at once, whatever they wait for, and so their rows and blocks are free within a step.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from json.encoder import encode_basestring_ascii as quoted  # what json.dumps makes of a text, in a quarter of its time
from typing import Any, NamedTuple, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanovllm.engine.input_processor import Prompt
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.errors import error_event, error_response, fault_of
from nanovllm.server.http import BoundedHttp
from nanovllm.server.served import Followed, Served

__all__ = ["Asked", "EventStream", "Writer", "quoted", "unless_gone"]

Result = TypeVar("Result")

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies pass each event on as it comes
]


class Asked(NamedTuple):
    """One prompt of a request."""

    prompt: Prompt
    params: SamplingParams
    request_id: str


class Writer:
    """Makes the events of a dialect; "" is none. grows: knows more text of an answer, and nothing else, by `grow`."""

    grows = False

    def grow(self, number: int, text: str, num_tokens: int) -> str:
        """Of more text of prompt `number`, behind its first output and before its last."""
        raise NotImplementedError

    def feed(self, number: int, output: RequestOutput) -> str:
        """Of what is new of prompt `number`."""
        raise NotImplementedError

    async def end(self) -> str:
        """Behind all outputs."""
        raise NotImplementedError


class EventStream(Response):
    """The status is sent with the first event, so that an error before it has its own."""

    def __init__(self, served: Served, asked: Sequence[Asked], writer: Writer) -> None:
        self.background = None
        self._served, self._asked, self._writer = served, asked, writer
        self._followed: list[Followed] = []
        self._num_open = len(asked)  # of the prompts, those that have not ended
        self._fresh: dict[int, None] = {}  # of which there is news that nobody has read
        self._waiter: asyncio.Future[None] | None = None  # for these
        self._connection: BoundedHttp | None = None  # once parts of the answer may be written to it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _until_gone(receive, self._answer(scope, receive, send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        state, has_begun = scope["state"], False
        try:
            with self._served.admitted(sum(one.params.n for one in self._asked)):
                for number, one in enumerate(self._asked):
                    self._followed.append(await self._served.follow(*one, partial(self._call, number)))
                first = await self._news()
                await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                has_begun, send = True, state["server_send"]
                await send({"type": "http.response.body", "body": first.encode(), "more_body": True})
                self._connection = state.get("connection")
                while self._num_open:
                    if events := await self._news():
                        await send({"type": "http.response.body", "body": events.encode(), "more_body": True})
                last = await self._writer.end()
        except Exception as error:
            fault = fault_of(error, self._served, state["request_id"])
            if not has_begun:
                await error_response(scope["path"], fault)(scope, receive, send)
                return
            last = error_event(scope["path"], fault)
        finally:
            for followed in self._followed:
                followed.leave()
        await send({"type": "http.response.body", "body": last.encode(), "more_body": False})

    async def _news(self) -> str:
        """The events of all that nobody has read, once there is anything, or all prompts have ended."""
        events = ""
        while self._num_open and not events:
            if not self._fresh:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
            fresh, self._fresh = self._fresh, {}
            events = "".join(map(self._read, fresh))
        return events

    def _read(self, number: int) -> str:
        if self._writer.grows and (grown := self._followed[number].read_text()) is not None:
            return self._writer.grow(number, *grown)
        output = self._followed[number].read()
        self._num_open -= output.finished
        return self._writer.feed(number, output) if output.outputs else ""

    def _call(self, number: int) -> None:
        """There is news of a prompt."""
        waiter = self._waiter
        is_idle = waiter is not None and not waiter.done()  # else older events are on their way
        if waiter is None or not is_idle or self._connection is None or not self._connection.can_write:
            self._fresh[number] = None
            if waiter is not None and is_idle:
                waiter.set_result(None)
            return
        try:
            events = self._read(number)
        except Exception as error:
            waiter.set_exception(error)
            return
        if events:
            self._connection.write_part(events.encode())
        if not self._num_open:
            waiter.set_result(None)


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
