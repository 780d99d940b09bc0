"""Child processes: Python programs that this process starts, talks to, and outlives.

Owns starting, the news of an end, and stopping. A child is started by its module's name, not by forking and not from
the caller's script, so scripts need no main guard. Invariant: a child never outlives its parent, however that ends: it
holds the reading end of a pipe that the parent keeps open, and ends when that pipe does.
"""

import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from multiprocessing.connection import Connection
from selectors import EVENT_READ, DefaultSelector
from types import FrameType, MappingProxyType
from typing import Any, NamedTuple

from nanovllm.errors import EngineDeadError

_INTERRUPTING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
_AHEAD: ContextVar[Mapping[str, "list[Child]"]] = ContextVar("ahead", default=MappingProxyType({}))
_GRACE_SECONDS = 5.0  # that children get to end by themselves when asked to
_NEWS_SECONDS = 1.0  # how long to collect reports when one child has failed: the first to speak is rarely the cause


class Failure(NamedTuple):
    """What a child sends when it ends with an exception."""

    error: Exception | None  # None where it cannot be pickled
    traceback: str


class Child:
    """A running child, and the connection to it."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], connection: Connection, lifeline: int) -> None:
        self.name = name
        self.process = process
        self.connection = connection
        self._lifeline = lifeline

    def send(self, message: Any) -> None:
        """Raises OSError if the child has ended, or reads nothing for as long as `limit_sends` says."""
        self.connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def limit_sends(self, seconds: float) -> None:
        with socket.socket(fileno=os.dup(self.connection.fileno())) as ours:
            limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6) or 1)  # a timeval; all zero is no limit
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def release(self) -> None:
        self.connection.close()
        os.close(self._lifeline)


@contextmanager
def started_ahead(module: str, count: int) -> Iterator[None]:
    """Start so many children now, for the first `start_child` of this module inside: while they import what they need,
    which takes seconds, this process does the same.
    """
    children = [start_child(module, module) for _ in range(count)]
    token = _AHEAD.set({module: children})
    try:
        yield
    finally:
        _AHEAD.reset(token)
        for child in children:  # that nobody has taken
            child.process.kill()
            child.process.wait()
            child.release()


def start_child(name: str, module: str, arguments: Sequence[object] = (), fds: Sequence[int] = ()) -> Child:
    """Run `python -m module`, which calls `connect_to_parent`, with further arguments and open descriptors `fds`."""
    ahead = _AHEAD.get().get(module)
    if ahead:
        child = ahead.pop()
        child.name = name
        return child
    ours, theirs = socket.socketpair()
    reading_end, lifeline = os.pipe()
    # -P and this path: the child imports what we would import, and nothing of the folder it happens to start in.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    own = (theirs.fileno(), reading_end, os.getpid())
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *map(str, (*own, *arguments))],
            stdin=subprocess.DEVNULL,
            pass_fds=(*own[:2], *fds),
            env={**os.environ, "PYTHONPATH": path},
        )
    except BaseException:
        os.close(lifeline)
        ours.close()
        raise
    finally:
        theirs.close()
        os.close(reading_end)
    return Child(name, process, Connection(ours.detach()), lifeline)


def connect_to_parent(arguments: Sequence[str]) -> tuple[Connection, list[int]]:
    """In the child: the connection, and the further arguments. From now on this process ends when its parent does.

    Ctrl-C is the parent's business: a terminal sends it to both.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection, lifeline, parent, *others = map(int, arguments)

    def watch() -> None:
        # A process that the parent forked may hold its ends of our pipes; its number as our parent it cannot hold.
        while os.getppid() == parent and not select.select([lifeline], [], [], 1.0)[0]:
            pass
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    return Connection(connection), others


class Children:
    """Those that belong together: when one ends, all end."""

    def __init__(self) -> None:
        self._parent = os.getpid()
        self.members: list[Child] = []
        self.guard: Callable[[], AbstractContextManager[None]] = uninterrupted  # around a message
        self._selector = DefaultSelector()

    def add(self, child: Child) -> None:
        self.members.append(child)
        self._selector.register(child.connection, EVENT_READ, child)

    def wait(self, deadline: float | None = None) -> bool:
        """Wait until some child has spoken; whether one has before the deadline of the monotonic clock."""
        left = None if deadline is None else deadline - time.monotonic()
        return (left is None or left > 0) and bool(self._selector.select(left))

    def have_spoken(self) -> bool:
        return bool(self._selector.select(0))

    def fileno(self) -> int:
        """Can be read from when a child has spoken. An event loop may make what it watches non-blocking, and the
        connections have to block: so it is the selector's.
        """
        return self._selector.fileno()

    def receive(self) -> list[tuple[Child, Any]]:
        """One message of each child that has spoken. Raises EngineDeadError, and ends all, if one has failed."""
        messages = []
        for key, _ in self._selector.select(0):
            with self.guard():
                message = _receive(key.data)
            if message is None or isinstance(message, Failure):
                raise self.fail(None, {key.data: message})
            messages.append((key.data, message))
        return messages

    def check(self) -> None:
        """Raise as `receive` does if a child has ended."""
        if any(child.process.poll() is not None for child in self.members):
            raise self.fail(None)

    def fail(self, reason: str | None, heard: dict[Child, Failure | None] | None = None) -> Exception:
        """End all children. Returns the error to raise: `reason`, or what each reported, those that were killed first.

        heard: from whom news has come already; None stands for a connection that has ended.
        """
        reports = dict(heard or {})
        for child in reports:
            self._selector.unregister(child.connection)
        deadline = time.monotonic() + (_NEWS_SECONDS if reason is None else 0.0)
        while len(reports) < len(self.members) and (left := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                message = _receive(key.data)
                if message is None or isinstance(message, Failure):
                    reports[key.data] = message
                    self._selector.unregister(key.fileobj)
        texts = [reason] if reason else []
        for child, report in sorted(reports.items(), key=lambda item: item[1] is not None):
            texts.append(f"{child.name} {_ending(child) if report is None else 'failed:'}")
            if report is not None:
                texts.append(report.traceback)
        self.kill()
        causes = [report.error for report in reports.values() if report is not None]
        if causes and len(causes) == len(reports) and isinstance(causes[0], (ValueError, TypeError, ImportError)):
            causes[0].add_note("\n".join(texts))
            return causes[0]
        return EngineDeadError("\n".join(texts))

    def kill(self) -> None:
        """End all children now. May be called twice; a process that was forked ends nobody."""
        if os.getpid() != self._parent:
            return
        for child in self.members:
            child.process.kill()
        self._release()

    def join(self) -> None:
        """Wait for children that have been told to end; end those that do not."""
        deadline = time.monotonic() + _GRACE_SECONDS
        for child in self.members:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
        self._release()

    def _release(self) -> None:
        for child in self.members:
            child.process.wait()
            child.release()
        self.members = []
        self._selector.close()


def _receive(child: Child) -> Any:
    """A message, or None if the child has ended."""
    try:
        return pickle.loads(child.connection.recv_bytes())
    except (EOFError, OSError):
        return None


def _ending(child: Child) -> str:
    try:
        status = child.process.wait(_NEWS_SECONDS)
    except subprocess.TimeoutExpired:
        return "closed its connection"
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back what handlers of signals do until the block is done: half a message would end the conversation.

    They run in the main thread only, and so are called there behind it, in the order the signals came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: handler for number in _INTERRUPTING if callable(handler := signal.getsignal(number))}
    held: list[tuple[int, FrameType | None]] = []
    for number in handlers:
        signal.signal(number, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number, frame in held:
        handlers[number](number, frame)
