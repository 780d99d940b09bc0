"""Lifetime: what interrupts a session, mends it, and ends it.

Owns what follows from an exception inside the turn, closing, and questions between two steps. Invariant: a step that
did not come to its end has not happened.

Whoever enters the turn and finds that the last one inside was interrupted restarts: what is in flight is dropped, and
all unfinished requests compute their KV anew. An exception of the engine's own, after which the device's state is
unknown, closes the session instead, and is told to everyone who waits. `is_from_outside` tells the two apart.
"""

import os
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from nanovllm.engine.features.interruptions import is_from_outside
from nanovllm.engine.interfaces import SteppedEngine
from nanovllm.engine.turn import Bell, Turn
from nanovllm.errors import EngineDeadError, cut

if TYPE_CHECKING:
    from nanovllm.engine.session import Handle, Inbox

Result = TypeVar("Result")


class Lifetime:
    """A part of `Session`."""

    get_ready: Callable[[], None] | None = None  # called before requests are made; raises where they could not run

    engine: SteppedEngine
    _handles: "dict[str, Handle]"
    _commands: "deque[Any]"
    _turn: Turn
    _is_torn: bool
    _num_restarts: int
    _waiting: "dict[Inbox[Any], None]"
    _guests: deque[Bell]
    _process: int
    _ending: str | None
    _is_closing: bool
    _carry_out_now: Callable[[], None]
    _try_inside: Callable[[Callable[[], object]], bool]
    _pass_on: Callable[[], None]
    _tell: "Callable[[Handle], None]"
    _forget: "Callable[[Handle], None]"
    _remove: "Callable[[Handle], None]"
    check_open: Callable[[], None]
    step: Callable[[], bool]

    @property
    def is_closed(self) -> bool:
        return self._ending is not None

    def closed_error(self) -> RuntimeError:
        return RuntimeError(f"this engine is closed ({self._ending}); make a new one")

    def _refusal(self) -> RuntimeError:
        """Why no request can be run."""
        if os.getpid() != self._process:
            return RuntimeError(
                f"this engine was made in process {self._process}, and a forked process cannot use it: make a new one"
            )
        if self._ending is not None:
            return self.closed_error()
        return RuntimeError("this engine was called from inside one of its own steps, where requests can only end")

    def find(self, request_id: str) -> "Handle | None":
        """The unfinished request of that id."""
        return self._handles.get(request_id)

    def has_unfinished_requests(self) -> bool:
        return bool(self._handles)

    def abort(self, handle: "Handle") -> None:
        """Stop a request; the news of its end have the finish reason "abort"."""
        self._commands.append((self._end, [handle]))
        self._carry_out_now()

    def exclusively(self, function: Callable[[], Result]) -> Result:
        """What function() returns, called in this thread between two steps."""
        self.check_open()
        results: list[Result] = []

        def call() -> None:
            results.append(function())

        bell = Bell()
        try:
            if self._guests or not self._try_inside(call):
                self._guests.append(bell)
                bell.sleep()
                while not self._try_inside(call):
                    self._guests.append(bell)
                    bell.sleep()
        finally:
            while bell in self._guests:
                self._guests.remove(bell)
            self._pass_on()
        return results[0]

    def poll(self, inbox: "Inbox[Any]", is_ready: Callable[[], bool]) -> None:
        """`wait` for who must not: one step, if the engine says inside the turn that it is ready for it.

        The inbox's bell rings when somebody has left the turn, and on nothing that the engine alone knows of.
        """
        self.check_open()
        self._waiting[inbox] = None
        self._try_inside(lambda: self.step() if is_ready() else None)

    def close(self) -> None:
        """Close the engine, after the step that runs now; whoever waits gets an error. May be called twice."""
        if os.getpid() != self._process:
            return  # a forked process owns nothing of it
        if self._ending is not None:
            self.engine.close()  # perhaps the first was interrupted
            return
        self._is_closing = True
        if self._turn.is_mine():
            return  # called by a signal handler, say; the step that it interrupted sees to it
        try:
            self.exclusively(lambda: None)
        except RuntimeError:
            if self._ending is None:
                raise

    # -- inside the turn --

    def _drop(self, handle: "Handle") -> None:
        """Forget a request that was cancelled."""
        self._remove(handle)
        if handle.queued_in == self._num_restarts:  # else it was left out when the engine restarted
            for request in handle.requests:
                self.engine.abort(request)
        self._forget(handle)
        handle.inbox.news.pop(handle, None)

    def _end(self, handle: "Handle") -> None:
        if self._handles.get(handle.request_id) is handle:
            for request in handle.requests:
                self.engine.abort(request)
            self._tell(handle)

    def _restart(self) -> None:
        """Mend what an interruption left: the engine begins anew with all that is unfinished, and all is told again."""
        self._num_restarts += 1
        handles = list(self._handles.values())
        for handle in handles:
            handle.queued_in = self._num_restarts
        self.engine.restart([request for handle in handles for request in handle.requests])
        for handle in handles:
            self._forget(handle)  # its text may be half decoded
            if any(request.output_token_ids for request in handle.requests) or handle.is_finished:
                self._tell(handle)
        self._is_torn = False

    def _shut_for(self, error: Exception) -> None:
        """Close the session if this, raised inside the turn, is the engine's own."""
        is_ours = self._is_torn or isinstance(error, EngineDeadError)
        if is_ours and not is_from_outside(error):
            self._shut(f"because a step failed: {type(error).__name__}: {cut(str(error))}")

    def _shut(self, ending: str) -> None:
        """The end: nothing is run any more, and everyone who waits is told."""
        self._ending = ending
        self._is_closing = False
        self._handles.clear()
        self._commands.clear()
        try:
            self.engine.close()
        finally:
            for bell in [*self._guests, *(inbox.bell for inbox in list(self._waiting))]:
                bell.ring()
