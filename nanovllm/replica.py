"""A data-parallel replica: a process with an engine of its own. Started by `data_parallel.py`.

    in     (name, number, value): start, add, abort, apply_model, get_metrics, reset_prefix_cache, close
    out    (number, answer) to start, apply_model, get_metrics and reset_prefix_cache; (0, [News, ...]) after a step

Owns the translation between keys and requests. Invariant: messages are taken in between steps, in the order they came,
so this engine runs as any other does.
"""

import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import astuple
from multiprocessing.connection import Connection
from typing import Any

import torch

from nanovllm.build import EngineParts, build_engine
from nanovllm.data_parallel import Admission, News, Ready, ReplicaSetup, growing
from nanovllm.engine.request import Request
from nanovllm.executor.calls import call_function, locked_sender, report_failure
from nanovllm.executor.children import connect_to_parent
from nanovllm.executor.worker import RunnerTimes

_Message = tuple[str, int, Any]


class Replica:
    def __init__(self, parts: EngineParts) -> None:
        self._engine = parts.engine
        self._input_processor = parts.input_processor
        self._requests: dict[int, Request] = {}
        self._keys: dict[Request, int] = {}
        self._reported: dict[int, list[int]] = {}  # of each list of `growing`, how many items the other side has

    def handle(self, name: str, value: Any) -> Any:
        """The answer; None where there is none to send."""
        if name == "add":
            self._add(value)
        elif name == "abort":
            request = self._requests.get(value)
            if request is not None:
                self._forget(request)
                self._engine.abort(request)
        elif name == "apply_model":
            return call_function(value, self._engine.apply_model)
        elif name == "get_metrics":
            return self._engine.get_metrics()
        else:
            assert name == "reset_prefix_cache"
            self._engine.reset_prefix_cache()
            return True
        return None

    def has_work(self) -> bool:
        return bool(self._requests)

    def step(self) -> list[News]:
        return [self._news(request) for request in self._engine.step() if request in self._keys]

    def _add(self, admission: Admission) -> None:
        group = admission.requests
        for key, request in enumerate(group, admission.key):
            if len(group) > 1:
                request.siblings = group
            # The other side has made one for the same parameters, so this raises nothing.
            request.constraint = self._input_processor.make_constraint(request.params, request.request_id)
            self._requests[key] = request
            self._keys[request] = key
            self._reported[key] = [len(items) for items in growing(request)]
        for request in group:
            self._engine.add_request(request)

    def _news(self, request: Request) -> News:
        key = self._keys[request]
        starts = self._reported[key]
        grown = tuple(items[start:] for items, start in zip(growing(request), starts, strict=True))
        self._reported[key] = [start + len(items) for start, items in zip(starts, grown, strict=True)]
        if request.is_finished:
            self._forget(request)
        return News(key, tuple(starts), grown, request.end, request.num_cached_tokens)

    def _forget(self, request: Request) -> None:
        key = self._keys.pop(request)
        del self._requests[key], self._reported[key]
        self._engine.output_processor.forget(request)


def main(arguments: list[str]) -> None:
    connection, _ = connect_to_parent(arguments)
    send = locked_sender(connection)
    messages: queue.SimpleQueue[_Message | None] = queue.SimpleQueue()
    # A thread of its own reads, so that neither side ever waits for the other to read what it sends.
    threading.Thread(target=_read_all, args=(connection, messages.put), daemon=True).start()
    status = report_failure(lambda: _run(messages, send), send)
    os._exit(status)


def _run(messages: "queue.SimpleQueue[_Message | None]", send: Callable[[Any], None]) -> None:
    message = messages.get()
    assert message is not None and message[0] == "start"
    parts = _start(message[2])
    replica = Replica(parts)
    times = parts.start_times
    send((message[1], Ready(parts.num_blocks, RunnerTimes(*astuple(times)[-len(RunnerTimes._fields) :]))))
    while True:
        while not replica.has_work() or not messages.empty():
            message = messages.get()
            if message is None or message[0] == "close":
                parts.engine.close()
                return
            name, number, value = message
            answer = replica.handle(name, value)
            if answer is not None:
                send((number, answer))
        news = replica.step()
        if news:
            send((0, news))


def _start(setup: ReplicaSetup) -> EngineParts:
    if setup.config.device.startswith("cuda"):
        torch.cuda.set_device(setup.config.device)
    else:
        torch.set_num_threads(setup.num_threads)
    return build_engine(setup.config)


def _read_all(connection: Connection, put: Callable[[_Message | None], None]) -> None:
    try:
        while True:
            put(connection.recv())
    except (EOFError, OSError):
        put(None)
    except Exception:  # a message that cannot be unpickled here
        traceback.print_exc()
        put(None)


if __name__ == "__main__":
    main(sys.argv[1:])
