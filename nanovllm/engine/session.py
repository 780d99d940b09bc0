"""Session: requests from any thread, run together by one engine.

Owns the unfinished requests, and whose turn it is to step the engine; what interrupts, mends or ends it is
`features/lifetime.py`. `LLM`, `AsyncLLM` and a data-parallel replica are its users.

Rule for threads: any thread may call anything. What changes the engine happens inside the turn, which one thread holds
at a time: whoever waits for news and finds the turn free steps the engine, for all. The others sleep until they have
news or are called to take over. Submitting and cancelling never wait: they are commands in a queue, carried out at
once if the turn is free, and else before the next step.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from typing import Any, Generic, TypeVar

from nanovllm.engine.features.lifetime import Lifetime
from nanovllm.engine.interfaces import SteppedEngine
from nanovllm.engine.request import Request
from nanovllm.engine.turn import Bell, Turn

News = TypeVar("News")


class Inbox(Generic[News]):
    """Where one caller finds news of its requests. make: from a request's sequences, what the caller wants to know.

    news: of each request that has changed since its caller took them, the newest, and whether they are the last. `make`
    is called inside the turn, and may be called again for the same state. The bell wakes the caller.
    """

    def __init__(self, make: Callable[[Sequence[Request]], News]) -> None:
        self.make = make
        self.news: dict[Handle, tuple[News, bool]] = {}
        self.bell = Bell()


@dataclass(eq=False, slots=True)
class Handle:
    """A request in a session: the sequences of one prompt. only_ends: its inbox wants no news before it has ended."""

    requests: Sequence[Request]
    inbox: Inbox[Any]
    only_ends: bool
    queued_in: int = field(default=-1, init=False)  # after how many restarts it was queued; -1: it never was

    @property
    def request_id(self) -> str:
        return self.requests[0].request_id

    @property
    def is_finished(self) -> bool:
        return all([request.end is not None for request in self.requests])  # noqa: C419  asked at each step


class Session(Lifetime):
    def __init__(self, engine: SteppedEngine) -> None:
        self.engine = engine
        self._handles: dict[str, Handle] = {}  # unfinished requests, by id
        self._commands: deque[tuple[Callable[[Handle], None], Sequence[Handle]]] = deque()
        self._turn = Turn()
        self._is_torn = False  # something inside the turn has begun, and has not come to its end
        self._num_restarts = 0
        self._waiting: dict[Inbox[Any], None] = {}
        self._guests: deque[Bell] = deque()  # bells of threads that want the turn once, before others
        self._process = os.getpid()
        self._ending: str | None = None  # why it is closed
        self._is_closing = False
        self._next_number = 0
        self._numbering = threading.RLock()

    # -- from any thread, at any time --

    @contextmanager
    def numbers(self, size: int) -> Iterator[list[int]]:
        """Numbers for new requests; as ids, none of them is in use. A block that raises uses none of them up."""
        if self.get_ready is not None:
            self.get_ready()
        with self._numbering:
            first = self._next_number
            numbers = list(islice((number for number in count(first) if str(number) not in self._handles), size))
            end = self._next_number = numbers[-1] + 1 if numbers else first
        try:
            yield numbers
        except BaseException:
            with self._numbering:
                if self._next_number == end:  # nobody has got later ones meanwhile
                    self._next_number = first
            raise

    def submit(self, handle: Handle) -> None:
        """Queue a request. Raises ValueError if its id is in use, RuntimeError if the session is closed."""
        self.check_open()
        if self._handles.setdefault(handle.request_id, handle) is not handle:
            raise ValueError(f"request_id {handle.request_id!r} is in use by an unfinished request; choose another")
        try:
            self._commands.append((self._add, [handle]))
            self._carry_out_now()
        except BaseException:
            self.cancel([handle])
            raise

    def cancel(self, handles: Sequence[Handle]) -> None:
        """Stop and forget requests, without news; those that have ended are passed over. In mid-step: after it."""
        unfinished = [handle for handle in handles if self._handles.get(handle.request_id) is handle]
        if unfinished and os.getpid() == self._process:
            self._commands.append((self._drop, unfinished))  # at once: an interruption comes before or after all
            for handle in unfinished:
                self._remove(handle)
            self._carry_out_now()

    def check_open(self) -> None:
        """Raise RuntimeError where no request can be run."""
        if self._ending is not None or os.getpid() != self._process or self._turn.is_mine():
            raise self._refusal()

    # -- who waits --

    def run(self, handles: Sequence[Handle], inbox: Inbox[News]) -> Generator[tuple[Handle, News], None, None]:
        """Submit these, which report to `inbox`; yield their news until all have ended.

        Whatever ends the loop before cancels the rest: generators end in `finally` when they are closed or forgotten.
        """
        try:
            yield from self._run(handles, inbox)
        finally:
            self.cancel(handles)  # again: an interruption may have come before the first had an effect

    def _run(self, handles: Sequence[Handle], inbox: Inbox[News]) -> Iterator[tuple[Handle, News]]:
        unfinished = set(handles)
        try:
            for handle in handles:
                self.submit(handle)
            while unfinished:
                self.wait(inbox)
                for handle in list(inbox.news):
                    news, is_last = inbox.news.pop(handle)
                    if handle in unfinished:  # else its last news have come twice, after an interruption
                        if is_last:
                            unfinished.remove(handle)
                        yield handle, news
        finally:
            self.cancel(handles)

    def wait(self, inbox: Inbox[Any]) -> None:
        """Return when the inbox has news: step the engine, or sleep while another thread does.

        Raises RuntimeError if the session is closed before.
        """
        try:
            while not inbox.news:
                self.check_open()
                self._waiting[inbox] = None  # first: who leaves the turn from here on sees it
                was_inside = not self._guests and self._turn.try_run(
                    lambda: self._inside(lambda: self._step_for(inbox))
                )
                if not inbox.news:
                    if was_inside:
                        self._pass_on()
                    inbox.bell.sleep()
        finally:
            self._waiting.pop(inbox, None)
            self._pass_on()

    def _carry_out_now(self) -> None:
        """Carry out the commands, unless somebody is inside, who will."""
        if self._ending is None:
            self._try_inside(lambda: None)
            self._pass_on()

    def _pass_on(self) -> None:
        """The turn may be free: wake who wants it once, or one of those who wait, if there is something to do.

        Who is woken is taken off the list, and enters again if need be: so one that an interruption left there is
        called in vain once.
        """
        if self._guests:
            with suppress(IndexError):  # another thread was faster
                self._guests.popleft().ring()
        elif self._waiting and (self._commands or self.engine.has_work()):
            for inbox in list(self._waiting)[:1]:
                self._waiting.pop(inbox, None)
                inbox.bell.ring()

    def _try_inside(self, function: Callable[[], object]) -> bool:
        """Call it inside the turn, unless that is taken; whether it was called."""
        return self._turn.try_run(partial(self._inside, function))

    # -- inside the turn --

    def _inside(self, function: Callable[[], object]) -> None:
        """Call it. All that happens inside the turn passes here: restarts, commands, and what an exception means."""
        if self._is_closing:
            self._shut("by close()")
        if self._ending is not None:
            self.check_open()
        try:
            if self._is_torn:
                self._restart()
            self._carry_out()
            function()
        except Exception as error:
            self._shut_for(error)
            raise
        if self._is_closing:
            self._shut("by close()")

    def _step_for(self, inbox: Inbox[Any]) -> None:
        """Step until the inbox has news, somebody else wants the turn, or there is nothing to do."""
        while self.step() and not (inbox.news or self._guests or self._is_closing):
            pass

    def step(self) -> bool:
        """One step, for a function that runs `exclusively`; is there more to do?"""
        self._carry_out()
        self._is_torn = True
        changed = self.engine.step()
        told: dict[Handle, None] = {}
        for request in changed:
            handle = self._handles.get(request.request_id)
            if handle is not None and (request.is_finished or not handle.only_ends):
                told[handle] = None
        for handle in told:
            self._tell(handle)
        self._is_torn = False
        return bool(self._commands) or self.engine.has_work()

    def _carry_out(self) -> None:
        """Commands in order. One that is interrupted stays first, and does nothing twice."""
        while self._commands:
            self._is_torn = True
            command, handles = self._commands[0]
            for handle in handles:
                command(handle)
            self._commands.popleft()
            self._is_torn = False

    def _add(self, handle: Handle) -> None:
        if self._handles.get(handle.request_id) is handle and handle.queued_in != self._num_restarts:
            for request in handle.requests:
                self.engine.add_request(request)
            handle.queued_in = self._num_restarts

    def _remove(self, handle: Handle) -> None:
        if self._handles.get(handle.request_id) is handle:
            del self._handles[handle.request_id]

    def _tell(self, handle: Handle) -> None:
        """Put the newest about a request into its inbox; one that has ended is forgotten."""
        is_last = handle.is_finished
        if handle.only_ends and not is_last:
            return
        if self._handles.get(handle.request_id) is handle:  # else it was cancelled in mid-step
            handle.inbox.news[handle] = handle.inbox.make(handle.requests), is_last
            handle.inbox.bell.ring()
            if is_last:
                self._forget(handle)
                self._remove(handle)  # last: until then an interruption is mended by a restart

    def _forget(self, handle: Handle) -> None:
        for request in handle.requests:
            self.engine.output_processor.forget(request)
