"""A tensor-parallel worker: a process that runs one rank's part of each plan. Started by `executor/mp.py`.

    argv   what `children.start_child` passes, then: rank, number of ranks, the ring's two descriptors
    in     (name, number, value) through the ring: start, execute, apply, close; every rank gets each
    out    (number, value) through the connection: start and apply from every rank, execute from rank 0 alone

Owns the rank's place in the process group. Invariant: messages are carried out in the order they came, so every rank
calls the same collectives in the same order.
"""

import os
import pickle
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from nanovllm.distributed.process_group import join_group, leave_group
from nanovllm.engine.interfaces import PendingStep
from nanovllm.executor.calls import call_function, locked_sender, report_failure
from nanovllm.executor.children import connect_to_parent
from nanovllm.executor.ring import RingReader
from nanovllm.executor.worker import Runner, build_runner
from nanovllm.executor.worker_messages import Ready, WorkerSetup
from nanovllm.weights.checkpoint import open_checkpoint


class Worker:
    def __init__(self, rank: int, size: int, send: Callable[[Any], None]) -> None:
        self._rank = rank
        self._size = size
        self._send = send
        self._runner: Runner | None = None
        self._pending: queue.SimpleQueue[tuple[int, PendingStep]] | None = None

    def handle(self, name: str, number: int, value: Any) -> None:
        if name == "execute":
            self._execute(number, value)
        elif name == "start":
            self._send((number, self._start(value)))
        else:
            assert name == "apply"
            runner = self._runner
            self._send((number, call_function(value, lambda function: function(runner))))

    def _start(self, setup: WorkerSetup) -> Ready:
        if setup.device_type == "cuda":
            device = torch.device("cuda", setup.first_device + self._rank)
            torch.cuda.set_device(device)
            self._pending = queue.SimpleQueue()
            threading.Thread(target=report_failure, args=(self._send_results, self._send), daemon=True).start()
        else:
            device = torch.device("cpu")
            torch.set_num_threads(setup.num_threads)
        config = setup.config
        tp = join_group(
            self._rank,
            self._size,
            device,
            timeout=config.distributed_timeout_seconds,
            store_port=setup.store_port,
        )
        is_packed = config.quantization == "gguf"
        checkpoint = open_checkpoint(config.model, load_format=config.load_format, revision=None, is_packed=is_packed)
        self._runner, times = build_runner(config, setup.model_config, checkpoint, device, tp)
        return Ready(self._runner.num_blocks, times)

    def _execute(self, number: int, plan: Any) -> None:
        assert self._runner is not None
        pending = self._runner.execute(plan)
        if self._rank != 0:
            return
        if self._pending is None:
            self._send((number, pending.result()))
        else:
            self._pending.put((number, pending))

    def close(self) -> None:
        """Let go of the runner, which finishes what it writes."""
        self._runner = None

    def _send_results(self) -> None:
        """On a GPU, in a thread of its own: the main one queues the next step meanwhile."""
        assert self._pending is not None
        while True:
            number, pending = self._pending.get()
            self._send((number, pending.result()))


def main(arguments: list[str]) -> None:
    connection, (rank, size, memory_fd, doorbell) = connect_to_parent(arguments)
    send = locked_sender(connection)
    ring = RingReader(memory_fd, doorbell, rank, size)
    worker = Worker(rank, size, send)

    def run() -> None:
        while True:
            name, number, value = pickle.loads(ring.read())
            if name == "close":
                worker.close()
                leave_group()
                return
            worker.handle(name, number, value)

    status = report_failure(run, send)
    os._exit(status)  # at once: taking the interpreter apart takes seconds, and all that matters has been sent


if __name__ == "__main__":
    main(sys.argv[1:])
