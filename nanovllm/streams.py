"""Streams: the way of an engine's news to the event loops of those who wait, and who steps the engine for them.

Owns both ways of stepping. An engine in this process is stepped by a thread (`step_for_all`), which calls each event
loop once a step. One in a process of its own needs no stepping, only somebody who reads what it sends: an event loop
can do that itself (`Poller`), and spends on it a fraction of what two threads that share Python's interpreter do.
Invariant: nobody waits for a consumer; who is slow finds several steps' tokens in one output.
"""

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context

from nanovllm.data_parallel import DataParallelEngine
from nanovllm.engine.output_processor import Marks
from nanovllm.engine.session import Handle, Inbox, Session
from nanovllm.engine.turn import Bell
from nanovllm.llm import LLM
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import RequestOutputKind

_TICK_SECONDS = 1.0  # how long an engine that says nothing at all is left alone


class Stream:
    """News of one request on their way to an event loop: the newest marks, or the error that ended the engine."""

    def __init__(self, llm: LLM, handle: Handle, called: Callable[[], None]) -> None:
        self.handle = handle
        self.loop = asyncio.get_running_loop()
        self.newest: Marks | RuntimeError | None = None
        self.is_called = False  # the loop has been asked to wake it, and has not come to it yet
        self.has_news = self.is_finished = False
        self._llm, self._called = llm, called
        params = handle.requests[0].params
        self._is_delta = params.output_kind is RequestOutputKind.DELTA
        self._is_plain = self._is_delta and len(handle.requests) == 1 and params.logprobs is None
        self._seen: Marks = ()

    def wake(self) -> None:
        self.is_called = False
        self.has_news = True
        self._called()

    def read_text(self) -> tuple[str, int] | None:
        """What is new, as text and number of tokens, if there is nothing else to say of it; None: `read` it.

        So it is with nearly all news of a stream, and no outputs have to be made of them.
        """
        newest = self.newest
        if not self._is_plain or not self._seen or newest is None or isinstance(newest, RuntimeError):
            return None
        start, end = self._seen[0], newest[0]
        if end.is_ended or end.text is None:
            return None
        self.has_news = False
        self._seen = newest
        return end.text.between(start.num_characters, end.num_characters), end.num_tokens - start.num_tokens

    def read(self) -> RequestOutput:
        """The output of all news. Raises RuntimeError if the engine has closed."""
        self.has_news = False
        newest = self.newest
        assert newest is not None
        if isinstance(newest, RuntimeError):
            raise newest
        output = self._llm._make_output(self.handle.requests, newest, self._seen if self._is_delta else None)
        self._seen, self.is_finished = newest, output.finished
        return output


Streams = dict[Handle, Stream]


def step_for_all(session: Session, inbox: Inbox[Marks], streams: Streams) -> None:
    """A thread's work: step the engine while there is something to do, and tell the streams."""
    try:
        while True:
            session.wait(inbox)
            _call(_take_news(inbox, streams))
    except BaseException as error:
        _call(_end(session, streams, error))


class Poller:
    """Reads what an engine in another process sends, in the event loop that runs now."""

    def __init__(self, session: Session, engine: DataParallelEngine, inbox: Inbox[Marks], streams: Streams) -> None:
        self._session, self._engine, self._inbox, self._streams = session, engine, inbox, streams
        self._loop = asyncio.get_running_loop()
        inbox.bell = _LoopBell(self._loop, self._poll)
        self._fd = os.dup(engine.fileno())  # which the engine does not close under the loop's hands
        self._is_closed = False
        self._loop.add_reader(self._fd, self._poll)
        self._timer = self._loop.call_later(_TICK_SECONDS, self._tick)

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._timer.cancel()
            self._loop.remove_reader(self._fd)
            os.close(self._fd)

    def _poll(self) -> None:
        if self._is_closed:
            return
        try:
            self._session.poll(self._inbox, self._engine.has_news)
            told = _take_news(self._inbox, self._streams)
        except Exception as error:
            self.close()
            told = _end(self._session, self._streams, error)
        for stream in told:
            stream.wake()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(_TICK_SECONDS, self._tick)
        self._poll()


class _LoopBell(Bell):
    """Has an event loop call something soon."""

    def __init__(self, loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
        self._loop, self._function = loop, function
        self._context = copy_context()  # who rings may be inside the turn, which who answers is not
        self._is_rung = False

    def ring(self) -> None:
        if not self._is_rung:
            self._is_rung = True
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._answer, context=self._context)

    def _answer(self) -> None:
        self._is_rung = False
        self._function()

    def sleep(self) -> None:
        raise AssertionError("an event loop polls, and does not sleep")


def _take_news(inbox: Inbox[Marks], streams: Streams) -> list[Stream]:
    """The streams that there is news for."""
    told = []
    for handle in list(inbox.news):
        marks, _ = inbox.news.pop(handle)
        stream = streams.get(handle)  # None: its iterator has just been left
        if stream is not None:
            stream.newest = marks
            told.append(stream)
    return told


def _end(session: Session, streams: Streams, error: BaseException) -> list[Stream]:
    """All streams, with the error that ended the engine."""
    session.close()
    for stream in list(streams.values()):
        stream.newest = session.closed_error()
        stream.newest.__cause__ = error
    return list(streams.values())


def _call(streams: list[Stream]) -> None:
    """Have these woken, by one call to each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Stream]] = {}
    for stream in streams:
        if not stream.is_called:
            stream.is_called = True
            by_loop.setdefault(stream.loop, []).append(stream)
    for loop, called in by_loop.items():
        with suppress(RuntimeError):  # the loop is closed: nobody is there to be woken
            loop.call_soon_threadsafe(_wake_all, called)


def _wake_all(streams: list[Stream]) -> None:
    for stream in streams:
        stream.wake()
