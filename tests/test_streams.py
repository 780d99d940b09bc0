"""An event loop that reads an engine's news itself: what it tells its streams, and who else may enter the turn."""

import asyncio
import os
import pickle
import socket
import struct
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.request import End, Request
from nanovllm.engine.session import Handle, Inbox, Session
from nanovllm.executor.children import Child, Children
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.streams import Poller, Stream, Streams
from tests.server import patient


class RemoteEngine:
    """Says what the test sends it through a socket: a token for each request, or the end."""

    def __init__(self) -> None:
        self.output_processor = OutputProcessor(None)
        self.reading, self.writing = socket.socketpair()
        self.reading.setblocking(False)
        self.requests: list[Request] = []
        self.steps: list[int] = []  # how many tokens each took in
        self.is_closed = False

    def send(self, text: str) -> None:
        self.writing.send(text.encode())

    def fileno(self) -> int:
        return self.reading.fileno()

    def has_news(self) -> bool:
        try:
            return bool(self.reading.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False

    def has_work(self) -> bool:
        return bool(self.requests)

    def add_request(self, request: Request) -> None:
        self.requests.append(request)

    def abort(self, request: Request) -> None:
        self.requests.remove(request)

    def step(self) -> list[Request]:
        said = self.reading.recv(100).decode()
        if "!" in said:
            raise OSError("the process has gone")
        changed = list(self.requests)
        for request in changed:
            request.token_ids += [7] * said.count("t")
            if "e" in said:
                request.end = End("stop")
        self.requests = [request for request in changed if request.end is None]
        self.steps.append(said.count("t"))
        return changed

    def restart(self, requests: Any) -> None:
        raise AssertionError("nothing was interrupted")

    def close(self) -> None:
        self.is_closed = True
        self.reading.close()
        self.writing.close()


class Followed:
    """A request, its stream, and the numbers of tokens that it was told of, each time."""

    def __init__(self, engine: RemoteEngine, session: Session, inbox: Inbox[Any], streams: Streams) -> None:
        params = SamplingParams(max_tokens=99, output_kind=RequestOutputKind.DELTA)
        request = Request(
            request_id=str(len(streams)), prompt=None, token_ids=[1], num_prompt_tokens=1, params=params, seed=0,
            stop_token_ids=frozenset(), max_total_tokens=100,
        )  # fmt: skip
        self.told: list[int] = []
        self.error: Exception | None = None
        llm: Any = SimpleNamespace(_make_output=engine.output_processor.make_output)
        self.stream = Stream(llm, Handle([request], inbox, only_ends=False), self._read)
        streams[self.stream.handle] = self.stream
        session.submit(self.stream.handle)

    def _read(self) -> None:
        try:
            output = self.stream.read()
        except RuntimeError as error:
            self.error = error
        else:
            self.told += [len(completion.token_ids) for completion in output.outputs]


class Scene:
    def __init__(self) -> None:
        self.engine = RemoteEngine()
        self.session = Session(self.engine)
        self.streams: Streams = {}
        self.inbox = Inbox(self.engine.output_processor.mark)
        remote: Any = self.engine
        self.poller = Poller(self.session, remote, self.inbox, self.streams)

    def follow(self) -> Followed:
        return Followed(self.engine, self.session, self.inbox, self.streams)


@contextmanager
def scene() -> Iterator[Scene]:
    made = Scene()
    try:
        yield made
    finally:
        made.poller.close()
        made.session.close()


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, patient.SECONDS))


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_news_are_read_without_a_thread_and_together_when_the_loop_is_late() -> None:
    async def main() -> None:
        before = threading.active_count()
        with scene() as here:
            followed = [here.follow(), here.follow()]
            here.engine.send("t")
            await until(lambda: here.engine.steps == [1])
            here.engine.send("t")
            here.engine.send("t")
            here.engine.send("te")
            await until(lambda: here.engine.steps == [1, 3])
            assert all(one.told == [1, 3] and one.stream.is_finished for one in followed)
            assert threading.active_count() == before

    run(main())


def test_what_comes_while_another_thread_is_inside_is_read_when_it_has_left() -> None:
    async def main() -> None:
        may_leave = threading.Event()
        with scene() as here:
            followed = here.follow()
            is_inside = threading.Event()

            def stay() -> None:
                is_inside.set()
                may_leave.wait(patient.SECONDS)

            asking = asyncio.create_task(asyncio.to_thread(here.session.exclusively, stay))
            await until(is_inside.is_set)
            here.engine.send("t")
            late = here.follow()  # a command that waits for the turn
            await asyncio.sleep(0.01)
            assert here.engine.steps == []
            may_leave.set()
            await asking
            await until(lambda: followed.told == [1] and late.told == [1])

    run(main())


def test_an_engine_that_has_gone_is_told_to_all_streams_once() -> None:
    async def main() -> None:
        with scene() as here:
            followed = [here.follow(), here.follow()]
            here.engine.send("!")
            await until(lambda: all(one.error for one in followed))
            assert all("the process has gone" in str(one.error) for one in followed)
            assert here.engine.is_closed and here.session.is_closed
            await asyncio.sleep(0.01)
            assert all(one.told == [] for one in followed)

    run(main())


def test_closing_in_another_thread_ends_the_streams() -> None:
    async def main() -> None:
        with scene() as here:
            followed = here.follow()
            await asyncio.to_thread(here.session.close)
            await until(lambda: followed.error is not None)

    run(main())


def test_a_message_in_pieces_is_whole_for_who_reads_it_in_a_loop() -> None:
    """libuv makes whatever it watches non-blocking, also through a duplicate of its descriptor."""
    uvloop = pytest.importorskip("uvloop")
    ours, theirs = socket.socketpair()
    children = Children()
    process: Any = None
    children.add(Child("replica 0", process, Connection(ours.detach()), -1))
    received: list[Any] = []

    async def main() -> None:
        fd = os.dup(children.fileno())
        loop = asyncio.get_running_loop()
        loop.add_reader(fd, lambda: received.extend(message for _, message in children.receive()))
        message = pickle.dumps("x" * 1000)
        theirs.sendall(struct.pack("!i", len(message)))
        threading.Timer(0.05, lambda: theirs.sendall(message)).start()
        await until(lambda: received)
        loop.remove_reader(fd)
        os.close(fd)

    uvloop.run(asyncio.wait_for(main(), patient.SECONDS))
    assert received == ["x" * 1000]
    children.members[0].connection.close()
    theirs.close()
