"""Update: one change of an engine's weights, from the first tensor to the new version.

Owns the way of the tensors to all workers, and the moment when they take the place of the old ones: between two steps,
in every process that plans. Invariant: until `commit` writes, nothing has changed but memory that `drop` gives back.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nanovllm.data_parallel import DataParallelEngine
from nanovllm.engine.features.weights_version import WeightsVersion, note_version
from nanovllm.engine.session import Session
from nanovllm.executor.children import uninterrupted
from nanovllm.live.in_flight import is_paused, pause, resume, settle
from nanovllm.live.incoming import Incoming
from nanovllm.live.model_weights import Hold, Named, Table, Write, describe, drop

_BYTES_AT_ONCE = 64 * 2**20  # of a message to workers, if there is more than one tensor in it


@dataclass(frozen=True)
class OnWorkers:
    """function(runner) on each worker of a session's engine."""

    function: Callable[[Any], Any]

    def __call__(self, session: Session) -> list[Any]:
        assert session.engine.planner is not None
        return session.engine.planner.executor.apply(self.function)


@dataclass(frozen=True)
class Renew:
    """Where an engine plans, with no step in flight: its workers write, and from here on this is the version."""

    version: WeightsVersion
    write: Callable[[Any], Any]

    def __call__(self, session: Session) -> None:
        OnWorkers(self.write)(session)
        assert session.engine.planner is not None
        scheduler = session.engine.planner.scheduler
        scheduler.cache.weights = self.version
        note_version(scheduler.running, self.version)


def everywhere(session: Session, function: Callable[[Session], Any]) -> list[Any]:
    """What function(session) returns where an engine plans: here, or in each replica. Called inside the turn."""
    if isinstance(session.engine, DataParallelEngine):
        return session.engine.do(function)
    return [function(session)]


def on_workers(session: Session, function: Callable[[Any], Any]) -> list[Any]:
    """What function(runner) returns, for each worker of all engines, between two steps."""
    answers = session.exclusively(lambda: everywhere(session, OnWorkers(function)))
    return [result for results in answers for result in results]


class Update:
    def __init__(self, session: Session, table: Table) -> None:
        """table: of the first worker; all have the same."""
        self._session = session
        self._incoming = Incoming(table)
        self._here: list[Named] = []
        self._num_bytes = 0  # of these
        self.is_half_written = False  # writing has begun, and has not come to its end
        self._is_remote = table.process != os.getpid()

    @property
    def names(self) -> Iterable[str]:
        """Of the tensors that the new weights fill."""
        return self._incoming.filled

    def take(self, weights: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]) -> None:
        """Check these and keep them, or send them. Raises TypeError, ValueError or NotImplementedError."""
        for item in weights.items() if isinstance(weights, Mapping) else weights:
            try:
                name, tensor = item
            except (TypeError, ValueError):
                raise TypeError(f"weights must be pairs of a name and a tensor, got {type(item).__name__}") from None
            for named in self._incoming.add(name, tensor):
                size = tensor.nbytes
                if self._is_remote and self._here and self._num_bytes + size > _BYTES_AT_ONCE:
                    self._send()
                self._here.append(named)
                self._num_bytes += size

    def _send(self) -> None:
        from nanovllm.live.shared_tensors import portable

        on_workers(self._session, Hold([(name, portable(tensor)) for name, tensor in self._here]))
        self._here, self._num_bytes = [], 0

    def commit(self, version: WeightsVersion, mode: str) -> None:
        """Write all that was taken, in place of the old, between two steps. mode: of `in_flight.py`."""
        if self._is_remote and self._here:
            self._send()
        write = Write(None if self._is_remote else self._here)
        self._session.exclusively(lambda: self._renew(Renew(version, write), mode))

    def _renew(self, renew: Renew, mode: str) -> None:
        session = self._session
        if mode == "wait":
            settle(session, mode)
        was_paused = is_paused(session)
        pause(session, "keep")
        try:
            if mode != "wait":
                settle(session, mode)
            with uninterrupted():
                self.is_half_written = True
                everywhere(session, renew)
                self.is_half_written = False
                if isinstance(session.engine, DataParallelEngine):
                    session.engine.forget_cached()
        finally:
            if not was_paused and not self.is_half_written:
                resume(session)

    def drop(self) -> None:
        """The old weights stay."""
        self._here = []
        if self._is_remote and not self._session.is_closed:
            on_workers(self._session, drop)


def table_of(session: Session) -> Table:
    table: Table = on_workers(session, describe)[0]
    return table
