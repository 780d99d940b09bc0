"""MultiprocessExecutor: one worker process for each tensor-parallel rank, on this host.

        planner (this process) --plan--> ring in shared memory --> every worker
                               <--tokens-- connection <----------- worker of rank 0

Owns the workers. They start when the engine is built and end with it. Invariant: every worker gets every message, in
order; a worker that fails ends them all, and the next call here raises what it reported.
"""

import pickle
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from nanovllm.config import ResolvedConfig
from nanovllm.distributed.process_group import open_store
from nanovllm.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput
from nanovllm.executor.calls import CallFailed, pickle_function
from nanovllm.executor.children import Children, start_child, uninterrupted
from nanovllm.executor.ring import RingWriter
from nanovllm.executor.worker_messages import Ready, WorkerSetup
from nanovllm.model_config import ModelConfig

_POLL_SECONDS = 0.0005  # between looks at a full ring


class PendingPlan(NamedTuple):
    executor: "MultiprocessExecutor"
    number: int

    def result(self) -> ModelRunnerOutput:
        return self.executor.wait_for(self.number)


class MultiprocessExecutor:
    def __init__(self, config: ResolvedConfig, model_config: ModelConfig, device: torch.device) -> None:
        """config is resolved, its model a path; device: that of rank 0, on a GPU the first of several.

        Raises what the workers raise while they load the model.
        """
        self._timeout = config.distributed_timeout_seconds
        self._children = Children()
        self._number = 0
        size = config.tensor_parallel_size
        self._ring = RingWriter(size)
        self._finalize = weakref.finalize(self, _abandon, self._children, self._ring)
        for rank in range(size):
            fds = self._ring.reader_fds(rank)
            name = f"tensor-parallel worker {rank}"
            self._children.add(start_child(name, "nanovllm.executor.worker_process", (rank, size, *fds), fds))
        self._ring.release_reader_fds()
        self._store = open_store(size) if size > 1 else None
        setup = WorkerSetup(
            config=config,
            model_config=model_config,
            device_type=device.type,
            first_device=device.index or 0,
            num_threads=max(1, torch.get_num_threads() // size),
            store_port=self._store.port if self._store is not None else 0,
        )
        ready: list[Ready] = self._call("start", setup)
        self.num_blocks = ready[0].num_blocks
        self.start_times = ready[0].times

    def execute(self, plan: SchedulerOutput) -> PendingPlan:
        return PendingPlan(self, self._send("execute", plan))

    def wait_for(self, number: int) -> ModelRunnerOutput:
        """The tokens of the step of that number; those of earlier steps that nobody waited for are dropped."""
        deadline = time.monotonic() + self._timeout
        while self._children.wait(deadline):
            for _, (answered, output) in self._children.receive():
                if answered == number:
                    return output
        raise self._children.fail(self._silence("a step"))

    def apply(self, function: Callable[[Any], Any]) -> list[Any]:
        """What function(runner) returns, for each rank.

        The function travels by its name, so it must be one that can be imported, or TypeError is raised; its result is
        copied.
        """
        results = self._call("apply", pickle_function(function), time.monotonic() + self._timeout)
        for rank, result in enumerate(results):
            if isinstance(result, CallFailed):
                raise result.as_error(f"tensor-parallel rank {rank}")
        return results

    def _call(self, name: str, value: Any, deadline: float | None = None) -> list[Any]:
        """The answers of all ranks, in their order. TimeoutError behind the deadline; a late answer is passed over."""
        number = self._send(name, value)
        answers: dict[str, Any] = {}
        while len(answers) < len(self._children.members):
            if not self._children.wait(deadline):
                raise TimeoutError(self._silence(name))
            for child, (answered, answer) in self._children.receive():
                if answered == number:
                    answers[child.name] = answer
        return [answers[child.name] for child in self._children.members]

    def _silence(self, name: str) -> str:
        return f"no answer within {self._timeout:g} s (distributed_timeout_seconds) to {name}"

    def _send(self, name: str, value: Any) -> int:
        self._number += 1
        message = pickle.dumps((name, self._number, value), pickle.HIGHEST_PROTOCOL)
        deadline = time.monotonic() + self._timeout

        def wait() -> None:
            self._children.check()
            if time.monotonic() > deadline:
                raise self._children.fail(f"a worker read nothing for {self._timeout:g} s")
            time.sleep(_POLL_SECONDS)

        with uninterrupted():
            self._ring.write(message, wait)
        return self._number

    def close(self) -> None:
        """End the workers and wait for them. May be called twice."""
        if self._finalize.detach() is None:
            return
        if self._children.members:
            with suppress(RuntimeError):  # one has ended already, and so have the others by now
                self._send("close", None)
        self._ring.close()
        self._children.join()
        self._store = None


def _abandon(children: Children, ring: RingWriter) -> None:
    ring.close()
    children.kill()
