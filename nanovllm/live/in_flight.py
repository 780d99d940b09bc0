"""Requests in flight, when the engine is paused or its weights change under it: what becomes of them, by `mode`.

    keep        they go on where they are, with the keys and values that they have
    recompute   they go on where they are, and their keys and values are computed anew
    restart     they begin again behind their prompts; but those whose tokens are read as they come are recomputed
    abort       they end, with the output that they have and finish_reason "abort"
    wait        they come to their ends first

Owns these modes. Everything here is called inside the session's turn, in the process that plans or, where engines are
replicas, first in the one that sends requests to them. Invariant: no step is in flight when the weights change.
"""

from functools import partial
from typing import Any

from nanovllm.data_parallel import DataParallelEngine
from nanovllm.engine.engine import Engine
from nanovllm.engine.features.restart import preempt_all, rewind
from nanovllm.engine.session import Handle, Session

MODES = ("keep", "recompute", "restart", "abort", "wait")


def check_mode(mode: Any) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be {', '.join(map(repr, MODES[:-1]))} or {MODES[-1]!r}, got {mode!r}")


def is_paused(session: Session) -> bool:
    return _pausing(session).is_paused


def _pausing(session: Session) -> Engine | DataParallelEngine:
    engine = session.engine.planner or session.engine
    assert isinstance(engine, (Engine, DataParallelEngine))
    return engine


def pause(session: Session, mode: str) -> None:
    """Plan no step from here on. What is submitted later waits for `resume`."""
    settle(session, mode)
    engine = _pausing(session)
    engine.is_paused = True
    if isinstance(engine, DataParallelEngine):
        engine.do(partial(pause, mode="keep"))


def resume(session: Session) -> None:
    engine = _pausing(session)
    engine.is_paused = False
    if isinstance(engine, DataParallelEngine):
        engine.do(resume)


def settle(session: Session, mode: str) -> None:
    """Do to the requests in flight what the mode says; no step is in flight behind it, but in replicas."""
    handles = list(session._handles.values())
    if mode == "wait":
        if handles and is_paused(session):
            raise RuntimeError("mode='wait' waits for requests that a pause holds: resume() first, or abort them")
        while any(session.find(handle.request_id) is handle for handle in handles):
            session.step()
    drain(session)
    if mode == "abort":
        for handle in handles:
            session._end(handle)
    elif mode == "restart":
        for handle in handles:
            if handle.only_ends:
                _restart(session, handle)
    if mode in ("recompute", "restart"):
        _recompute(session)


def drain(session: Session) -> None:
    """Come to the end of the steps in flight, and tell of their tokens."""
    engine = session.engine.planner
    if engine is None:
        return  # each replica does it for itself
    was_paused, engine.is_paused = engine.is_paused, True
    try:
        while engine.has_work():
            session.step()
    finally:
        engine.is_paused = was_paused


def _recompute(session: Session) -> None:
    engine = _pausing(session)
    if isinstance(engine, DataParallelEngine):
        engine.do(_recompute)
    else:
        drain(session)
        preempt_all(engine.scheduler)


def _restart(session: Session, handle: Handle) -> None:
    for request in handle.requests:
        session.engine.abort(request)
    session._forget(handle)
    for request in handle.requests:
        rewind(request)
    for request in handle.requests:
        session.engine.add_request(request)
