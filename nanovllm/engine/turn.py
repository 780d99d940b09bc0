"""Turn: a lock that one thread at a time holds, never twice, and that is free again whatever is raised inside.

A signal handler may raise between any two lines, also in a `with` or `finally` of ours before it has released a lock.
`contextvars.Context.run` does what is needed here, in C: it refuses a second entry, from this thread or another, and
leaves in every case. Invariant: nobody waits for it; whoever finds it taken decides what to do,
say to sleep until a bell rings.
"""

from collections.abc import Callable
from contextlib import suppress
from contextvars import Context, ContextVar
from queue import Empty, SimpleQueue

_NAP_SECONDS = 1.0  # a call to take over that an interruption swallowed costs so much, and nothing else
_INSIDE: ContextVar["Turn | None"] = ContextVar("inside", default=None)


class Turn:
    def __init__(self) -> None:
        self._context = Context()
        self._context.run(_INSIDE.set, self)

    def is_mine(self) -> bool:
        """Is this called, however indirectly, from a function that `try_run` runs?"""
        return _INSIDE.get() is self

    def try_run(self, function: Callable[[], None]) -> bool:
        """Call it unless somebody is inside; whether it was called."""
        has_entered = False

        def enter() -> None:
            nonlocal has_entered
            has_entered = True
            function()

        try:
            self._context.run(enter)
        except RuntimeError:
            if has_entered:
                raise
            return False
        return True


class Bell:
    """Wakes one sleeper; it can be rung anywhere, even by the garbage collector."""

    def __init__(self) -> None:
        self._rings: SimpleQueue[None] = SimpleQueue()

    def ring(self) -> None:
        if self._rings.empty():
            self._rings.put(None)

    def sleep(self) -> None:
        """Until it rings, or for a while."""
        with suppress(Empty):
            self._rings.get(timeout=_NAP_SECONDS)
