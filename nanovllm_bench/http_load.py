"""A load on an OpenAI-compatible server: requests that arrive when they are due, and what comes back, with its time.

Owns the connections, which are kept open and used again, as clients do. Invariant: while the clock runs, what comes is
only written down; it is read afterwards, so that the one who measures takes as little of the machine as it can.
"""

import asyncio
import json
import random
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar
from urllib.parse import urlsplit

Result = TypeVar("Result")


@dataclass
class Exchange:
    """One request. due: when it was to be sent; arrivals: what came, and when; error: why nothing more came."""

    due: float = 0.0
    arrivals: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Reply:
    """Of one exchange. times: when text came, each once; all in seconds after it was due."""

    times: list[float]
    end: float
    num_tokens: int
    num_prompt_tokens: int


class Target:
    """url: of the server, with or without the /v1 of its routes."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"a server's URL begins with http:// or https://, got {url!r}")
        self.host, self.is_tls = parts.hostname, parts.scheme == "https"
        self.port = parts.port or (443 if self.is_tls else 80)
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._key = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        self._idle: list[_Connection] = []

    def request(self, method: str, path: str, body: Any = None) -> bytes:
        content = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {self._prefix}{path} HTTP/1.1\r\nhost: {self.host}:{self.port}\r\n{self._key}"
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content

    async def ask(self, method: str, path: str) -> Any:
        """The JSON of a small answer. Raises ConnectionError where there is none."""
        exchange = Exchange(perf_counter())
        await self.exchange(self.request(method, path), exchange)
        status, parts = read_http(exchange.arrivals)
        if status != 200:
            raise ConnectionError(f"{method} {path} of {self.host}:{self.port}: {exchange.error or f'status {status}'}")
        return json.loads(b"".join(part for _, part in parts) or b"null")

    async def exchange(self, request: bytes, exchange: Exchange) -> None:
        """Send it on a connection that is free, or on a new one; return when the answer has ended."""
        connection = self._idle.pop() if self._idle else await self.connect()
        try:
            await connection.exchange(request, exchange)
        except OSError as error:
            exchange.error = str(error) or type(error).__name__
        if connection.is_open:
            self._idle.append(connection)

    async def connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_connection(_Connection, self.host, self.port, ssl=self.is_tls or None)
        return protocol

    async def open_idle(self, count: int) -> list["_Connection"]:
        """Connections that have asked for something once, and stay open."""
        connections = []
        for _ in range(count):
            connection = await self.connect()
            await connection.exchange(self.request("GET", "/health"), Exchange())
            connections.append(connection)
        return connections

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self.is_open = True
        self._exchange: Exchange | None = None
        self._done: asyncio.Future[None] | None = None
        self._length: int | None = None  # of the answer; None: its end is marked, or its head has not come

    async def exchange(self, request: bytes, exchange: Exchange) -> None:
        self._exchange, self._done, self._length = exchange, asyncio.get_running_loop().create_future(), None
        self._transport.write(request)
        await self._done

    def data_received(self, data: bytes) -> None:
        now, exchange = perf_counter(), self._exchange
        if exchange is None or self._done is None:
            return
        exchange.arrivals.append((now, data))
        if len(exchange.arrivals) == 1 or self._length is not None:
            self._length = _whole_length(exchange.arrivals)
        if self._length is None:
            is_whole = data.endswith(b"0\r\n\r\n") and _tail(exchange.arrivals).endswith(b"\r\n0\r\n\r\n")
        else:
            is_whole = sum(len(part) for _, part in exchange.arrivals) >= self._length
        if is_whole and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._done is not None and not self._done.done():
            self._done.set_exception(error or ConnectionResetError("the server closed the connection"))

    def close(self) -> None:
        self._transport.close()


def _whole_length(arrivals: Sequence[tuple[float, bytes]]) -> int | None:
    """Bytes of head and body, where the head says how long the body is."""
    head, end, _ = b"".join(part for _, part in arrivals).partition(b"\r\n\r\n")
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return len(head) + len(end) + int(value)
    return None


def _tail(arrivals: Sequence[tuple[float, bytes]]) -> bytes:
    return b"".join(part for _, part in arrivals[-2:])


def read_http(arrivals: Sequence[tuple[float, bytes]]) -> tuple[int, list[tuple[float, bytes]]]:
    """The status (0: none came), and the parts of the body with the times when they were whole."""
    head, buffer, parts, is_chunked = b"", b"", [], False
    for time, data in arrivals:
        buffer += data
        if not head:
            if b"\r\n\r\n" not in buffer:
                continue
            head, _, buffer = buffer.partition(b"\r\n\r\n")
            is_chunked = b"transfer-encoding: chunked" in head.lower()
        if not is_chunked:
            parts.append((time, buffer))
            buffer = b""
            continue
        while (at := buffer.find(b"\r\n")) > 0:
            size = int(buffer[:at].partition(b";")[0], 16)
            if len(buffer) < at + 2 + size + 2:
                break
            parts.append((time, buffer[at + 2 : at + 2 + size]))
            buffer = buffer[at + 2 + size + 2 :]
    return (int(head.split(b" ", 2)[1]) if head else 0), parts


def _events(parts: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, Any]]:
    """The JSON of a stream's events, each with the time when it was whole."""
    buffer = b""
    for time, data in parts:
        *events, buffer = (buffer + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            text = b"".join(line[5:] for line in event.split(b"\n") if line.startswith(b"data:")).strip()
            if text and text != b"[DONE]":
                yield time, json.loads(text)


def read_reply(exchange: Exchange) -> Reply:
    """What a streamed answer was. Raises ValueError for one that failed."""
    status, parts = read_http(exchange.arrivals)
    if exchange.error is not None or status != 200:
        body = b"".join(part for _, part in parts).decode(errors="replace")
        raise ValueError(exchange.error or f"status {status}: {body[:300]}")
    times: list[float] = []
    usage: dict[str, Any] = {}
    for time, event in _events(parts):
        if "error" in event:
            raise ValueError(f"an error in the stream: {event['error']}")
        for choice in event.get("choices", ()):
            if choice.get("error") or choice.get("finish_reason") in ("error", "abort"):
                raise ValueError(f"a choice ended as {choice.get('finish_reason')!r}: {choice.get('error')}")
        if any(map(_has_text, event.get("choices", ()))) and (not times or times[-1] < time - exchange.due):
            times.append(time - exchange.due)
        usage = event.get("usage") or usage
    if not usage:
        raise ValueError("the stream ended without its usage: this server knows no stream_options.include_usage")
    end = exchange.arrivals[-1][0] - exchange.due
    return Reply(times or [end], end, usage["completion_tokens"], usage["prompt_tokens"])


def _has_text(choice: dict[str, Any]) -> bool:
    """A token without text, or the opening of a chat's stream, shows nobody anything."""
    delta = choice.get("delta") or {}
    texts = choice.get("text"), delta.get("content"), delta.get("reasoning"), delta.get("reasoning_content")
    return any(texts) or bool(delta.get("tool_calls"))


def run_loop(main: Coroutine[Any, Any, Result]) -> Result:
    """`asyncio.run`, by uvloop if that is there: a client takes half the time for each thing that comes, and one that
    is busy all the time measures itself.
    """
    try:
        from uvloop import run
    except ImportError:
        return asyncio.run(main)
    return run(main)


async def drive(
    target: Target, path: str, bodies: Sequence[Any], offsets: Sequence[float], max_concurrency: int | None
) -> list[Exchange]:
    """Send bodies[i] when offsets[i] seconds have passed, with no more than `max_concurrency` unanswered at a time."""
    requests = [target.request("POST", path, body) for body in bodies]  # made before the clock runs
    exchanges = [Exchange() for _ in bodies]
    room = asyncio.Semaphore(max_concurrency or len(bodies))
    start = perf_counter()

    async def send(i: int, due: float) -> None:
        exchanges[i].due = due
        try:
            await target.exchange(requests[i], exchanges[i])
        except OSError as error:
            exchanges[i].error = str(error)
        finally:
            room.release()

    async with asyncio.TaskGroup() as group:
        for i, offset in enumerate(offsets):
            due = start + offset
            await asyncio.sleep(max(0.0, due - perf_counter()))
            if room.locked():  # who has to wait for the client itself is due when there is room
                await room.acquire()
                due = perf_counter()
            else:
                await room.acquire()
            group.create_task(send(i, due))
    return exchanges


def arrival_offsets(count: int, rate: float) -> list[float]:
    """Seconds from the start to each of `count` requests, `rate` a second on average (a Poisson process)."""
    rng, offsets, at = random.Random(0), [], 0.0
    for _ in range(count):
        offsets.append(at)
        at += rng.expovariate(rate) if rate != float("inf") else 0.0
    return offsets
