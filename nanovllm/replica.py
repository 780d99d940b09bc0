"""A data-parallel replica: a process with a session of its own. Started by `data_parallel.py`.

    in     (name, number, value): start, add, abort, apply_model, do, get_metrics, reset_prefix_cache, close
    out    (number, answer) to start, apply_model, do, get_metrics and reset_prefix_cache; (0, StepNews) after a step

Owns the translation between keys and the session's requests. One thread reads messages and obeys them in their order,
the main one steps, and sends what each step has brought as it ends. Invariant: neither side waits for the other to read
what it sends; this session runs as any other does.
"""

import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from nanovllm.build import EngineParts, build_engine
from nanovllm.data_parallel import Admission, News, Ready, ReplicaSetup, StepNews, growing
from nanovllm.engine.engine import Engine
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.request import Request
from nanovllm.engine.session import Handle, Inbox, Session
from nanovllm.executor.calls import call_function, locked_sender, report_failure
from nanovllm.executor.children import connect_to_parent
from nanovllm.executor.worker import RunnerTimes
from nanovllm.interpreter import share_interpreter


@dataclass(slots=True)
class _Told:
    """counts: of each list of `growing`, how many items the other side has. is_plain: only its tokens grow."""

    key: int
    counts: list[int]
    is_plain: bool
    has_begun: bool = False


class _ReportingEngine:
    """An engine that tells what each of its steps has brought, before its session looks at who has ended."""

    def __init__(self, engine: Any, report: Callable[[list[Request]], None]) -> None:
        self._engine, self._report = engine, report
        self.planner: Engine = engine
        self.output_processor: OutputProcessor = engine.output_processor
        self.add_request, self.abort, self.has_work = engine.add_request, engine.abort, engine.has_work
        self.restart, self.close = engine.restart, engine.close

    def step(self) -> list[Request]:
        changed: list[Request] = self._engine.step()
        if changed:
            self._report(changed)
        return changed


class Replica:
    def __init__(self, parts: EngineParts, send: Callable[[Any], None]) -> None:
        self.session = Session(_ReportingEngine(parts.engine, self._report))
        self._engine = parts.engine
        self._input_processor = parts.input_processor
        self._send = send
        self._inbox: Inbox[None] = Inbox(lambda group: None)  # says who has ended, and nothing that is not known
        self._handles: dict[int, Handle] = {}  # unfinished prompts, by the key of each of their sequences
        self._told: dict[Request, _Told] = {}

    # -- in the thread that reads --

    def handle(self, name: str, value: Any) -> Any:
        """The answer; None where there is none to send."""
        if name == "add":
            self._add(value)
        elif name == "abort":
            handle = self._handles.get(value)
            if handle is not None:
                self.session.cancel([handle])
                for request in handle.requests:
                    self._forget(request)
        elif name == "apply_model":
            return call_function(value, lambda f: self.session.exclusively(partial(self._engine.apply_model, f)))
        elif name == "do":
            return call_function(value, lambda f: [self.session.exclusively(partial(f, self.session))])
        elif name == "get_metrics":
            return self.session.exclusively(self._engine.get_metrics)
        else:
            assert name == "reset_prefix_cache"
            self.session.exclusively(self._engine.reset_prefix_cache)
            return True
        return None

    def _add(self, admission: Admission) -> None:
        group = admission.requests
        handle = Handle(group, self._inbox, only_ends=True)
        for key, request in enumerate(group, admission.key):
            # An id that comes again may meet the one before here, so the key stands before it.
            request.request_id = f"{admission.key}:{request.request_id}"
            if len(group) > 1:
                request.siblings = group
            # The other side has made one for the same parameters, so this raises nothing.
            request.constraint = self._input_processor.make_constraint(request.params, request.request_id)
            self._handles[key] = handle
            params = request.params
            is_plain = params.logprobs is None and request.scoring is None and request.capture is None
            self._told[request] = _Told(key, [len(items) for items in growing(request)], is_plain)
        self.session.submit(handle)

    def _forget(self, request: Request) -> None:
        """In either thread."""
        told = self._told.pop(request, None)
        if told is not None:
            self._handles.pop(told.key, None)

    # -- in the main thread --

    def run(self) -> None:
        """Step while there is something to do, and sleep else. Raises RuntimeError when the session has closed."""
        while True:
            self.session.wait(self._inbox)
            self._inbox.news.clear()

    def _report(self, changed: list[Request]) -> None:
        """Send what is new of these."""
        news = StepNews([], [], [], [])
        for request in changed:
            told = self._told.get(request)
            if told is None:
                continue
            start, count = told.counts[0], len(request.token_ids)
            is_next = told.has_begun and count == start + 1 and told.counts[-1] == len(request.weights_versions)
            if is_next and told.is_plain and request.end is None:
                news.keys.append(told.key)
                news.starts.append(start)
                news.token_ids.append(request.token_ids[start])
                told.counts[0] = count
            else:
                news.others.append(self._news(request, told))
        self._send((0, (*news[:3], list(map(tuple, news.others)))))  # plain tuples: a third of the cost of named ones

    def _news(self, request: Request, told: _Told) -> News:
        starts = tuple(told.counts)
        grown = tuple(items[start:] for items, start in zip(growing(request), starts, strict=True))
        told.counts = [start + len(items) for start, items in zip(starts, grown, strict=True)]
        told.has_begun = True
        if request.is_finished:
            self._forget(request)
        return News(told.key, starts, grown, request.end, request.num_cached_tokens, request.begun_at)


def main(arguments: list[str]) -> None:
    connection, _ = connect_to_parent(arguments)
    send = locked_sender(connection)
    os._exit(report_failure(lambda: _run(connection, send), send))


def _run(connection: Connection, send: Callable[[Any], None]) -> None:
    name, number, setup = connection.recv()
    assert name == "start"
    _use_device(setup)
    parts = build_engine(setup.config)
    replica = Replica(parts, send)
    times = parts.start_times
    send((number, Ready(parts.num_blocks, RunnerTimes(*astuple(times)[-len(RunnerTimes._fields) :]))))
    share_interpreter()
    is_closed = threading.Event()  # by the other side
    threading.Thread(target=_obey, args=(connection, setup, replica, send, is_closed), daemon=True).start()
    try:
        replica.run()
    except RuntimeError:
        if not is_closed.is_set():
            raise


def _use_device(setup: ReplicaSetup) -> None:
    """For the thread that calls it."""
    if setup.config.device.startswith("cuda"):
        torch.cuda.set_device(setup.config.device)
    else:
        torch.set_num_threads(setup.num_threads)


def _obey(
    connection: Connection,
    setup: ReplicaSetup,
    replica: Replica,
    send: Callable[[Any], None],
    is_closed: threading.Event,
) -> None:
    """What the thread that reads does, until the other side has closed or gone, or the engine has failed."""
    _use_device(setup)
    try:
        while (message := connection.recv())[0] != "close":
            name, number, value = message
            answer = replica.handle(name, value)
            if answer is not None:
                send((number, answer))
    except (EOFError, OSError):
        pass
    except Exception:  # a message that cannot be unpickled here
        if replica.session.is_closed:
            return  # by a failure, of which the main thread tells
        traceback.print_exc()
    is_closed.set()
    replica.session.close()


if __name__ == "__main__":
    main(sys.argv[1:])
