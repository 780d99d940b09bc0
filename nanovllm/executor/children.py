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
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from selectors import EVENT_READ, DefaultSelector
from types import FrameType
from typing import Any, NamedTuple

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
        self.connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def release(self) -> None:
        self.connection.close()
        os.close(self._lifeline)


def start_child(name: str, module: str, arguments: Sequence[object] = (), fds: Sequence[int] = ()) -> Child:
    """Run `python -m module`, which calls `connect_to_parent`, with further arguments and open descriptors `fds`."""
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
        self.members: list[Child] = []
        self._selector = DefaultSelector()

    def add(self, child: Child) -> None:
        self.members.append(child)
        self._selector.register(child.connection, EVENT_READ, child)

    def wait(self, limit: float | None = None) -> None:
        """Until some child has spoken. Raises RuntimeError, and ends all, if none does within `limit` seconds."""
        if not self._selector.select(limit):
            raise self.fail(f"no answer within {limit:g} s (distributed_timeout_seconds)")

    def receive(self, limit: float | None = None) -> list[tuple[Child, Any]]:
        """As `wait`; then one message of each child that has spoken. Raises RuntimeError too if one has failed.

        Who cannot lose a message to Ctrl-C waits first and then receives `uninterrupted`.
        """
        self.wait(limit)
        messages = []
        for key, _ in self._selector.select(0):
            with uninterrupted():
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
        return RuntimeError("\n".join(texts))

    def kill(self) -> None:
        """End all children now. May be called twice."""
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
    """Hold Ctrl-C back until the block is done: half a message would be the end of the conversation."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if held:
        previous(*held[0])
