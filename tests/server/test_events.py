"""When the events of a stream are written: at once while its socket has room, and as one where it has none."""

import asyncio
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.events import Asked, EventStream, Writer


class Request:
    """A request whose outputs the test makes: `say`."""

    def __init__(self, called: Callable[[], None]) -> None:
        self.called, self.said, self.is_left = called, "", False
        self.error: Exception | None = None

    def say(self, text: str) -> None:
        self.said += text
        self.called()

    def fail(self) -> None:
        self.error = ValueError("broken")
        self.called()

    def read(self) -> RequestOutput:
        if self.error is not None:
            raise self.error
        text, self.said = self.said, ""
        completion = CompletionOutput(index=0, text=text, token_ids=[], finish_reason="stop" if "." in text else None)
        return RequestOutput(
            request_id="id", prompt=None, prompt_token_ids=[1], outputs=[completion], finished="." in text
        )

    def leave(self) -> None:
        self.is_left = True


class Served:
    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.num_admitted = 0
        self.is_alive = True

    @contextmanager
    def admitted(self, number: int) -> Iterator[None]:
        self.num_admitted += number
        try:
            yield
        finally:
            self.num_admitted -= number

    async def follow(self, prompt: Any, params: SamplingParams, name: str, called: Callable[[], None]) -> Request:
        self.requests.append(Request(called))
        return self.requests[-1]


class Plain(Writer):
    def feed(self, number: int, output: RequestOutput) -> str:
        return f"{number}:{output.outputs[0].text} "

    async def end(self) -> str:
        return "END"


class Client:
    """What a client's connection does, and what has been written to it."""

    def __init__(self, num_prompts: int = 1) -> None:
        self.served = Served()
        self.sent: list[str] = []  # through ASGI's `send`
        self.parts: list[str] = []  # past it
        self.can_write = True
        self.has_gone = asyncio.Event()
        self.is_blocked = asyncio.Event()  # unset while `send` waits for room
        self.is_blocked.set()
        asked = [Asked("text", SamplingParams(), f"id-{i}") for i in range(num_prompts)]
        self.stream = EventStream(self.served, asked, Plain())  # type: ignore[arg-type]

    def write_part(self, data: bytes) -> None:
        self.parts.append(data.decode())

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        await self.is_blocked.wait()
        if message["type"] == "http.response.body":
            self.sent.append(message["body"].decode())

    async def _receive(self) -> MutableMapping[str, Any]:
        await self.has_gone.wait()
        return {"type": "http.disconnect"}

    def begin(self) -> "asyncio.Task[None]":
        state = {"request_id": "id", "server_send": self._send, "connection": self}
        scope = {"type": "http", "path": "/v1/completions", "state": state}
        return asyncio.ensure_future(self.stream(scope, self._receive, self._send))

    async def ask(self) -> "tuple[asyncio.Task[None], Request]":
        """`begin`, and the engine's request for its only prompt."""
        task = self.begin()
        await _settle()
        (request,) = self.served.requests
        return task, request


async def _settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_events_are_written_past_send_once_the_head_is_out() -> None:
    async def run() -> None:
        client = Client()
        task, request = await client.ask()
        for text in ("a", "b", "c."):
            request.say(text)
            await _settle()
        await task
        assert client.sent == ["0:a ", "END"]
        assert client.parts == ["0:b ", "0:c. "]
        assert request.is_left and client.served.num_admitted == 0

    asyncio.run(run())


def test_what_comes_while_a_socket_is_full_is_one_event_and_in_order() -> None:
    async def run() -> None:
        client = Client()
        task, request = await client.ask()
        request.say("a")
        await _settle()
        client.can_write = False
        client.is_blocked.clear()
        for text in ("b", "c", "d"):
            request.say(text)
            await _settle()
        client.can_write = True  # there is room again, but what came before has not been sent
        request.say("e")
        client.is_blocked.set()
        await _settle()
        request.say("f.")
        await task
        assert client.sent == ["0:a ", "0:b ", "0:cde ", "END"]
        assert client.parts == ["0:f. "]

    asyncio.run(run())


def test_each_prompt_of_a_body_is_read_when_it_has_news() -> None:
    async def run() -> None:
        client = Client(num_prompts=2)
        task = client.begin()
        await _settle()
        first, second = client.served.requests
        first.say("a")
        second.say("x.")
        await _settle()
        first.say("b.")
        await task
        assert client.sent == ["0:a 1:x. ", "END"]
        assert client.parts == ["0:b. "]

    asyncio.run(run())


def test_a_client_that_goes_before_its_first_token_leaves_nothing() -> None:
    async def run() -> None:
        client = Client()
        task = client.begin()
        await _settle()
        client.has_gone.set()
        await task
        assert client.served.requests[0].is_left and client.served.num_admitted == 0
        assert client.sent == [] and client.parts == []

    asyncio.run(run())


def test_an_error_in_a_stream_that_has_begun_is_its_last_event() -> None:
    async def run() -> None:
        client = Client()
        task, request = await client.ask()
        request.say("a")
        await _settle()
        request.fail()
        await task
        assert client.sent[0] == "0:a " and '"error"' in client.sent[-1]
        assert request.is_left and client.served.num_admitted == 0

    asyncio.run(run())
