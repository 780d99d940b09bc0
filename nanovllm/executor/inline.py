"""InlineExecutor: this process is the only worker; a plan is a function call away.

Owns the runner and lets go of it at the end. Invariant: it opens no port, no process group, no shared memory.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch

from nanovllm.engine.interfaces import PendingStep
from nanovllm.engine.scheduler_output import SchedulerOutput
from nanovllm.executor.worker import Runner


class InlineExecutor:
    def __init__(self, runner: Runner, leave: Callable[[], None] | None = None) -> None:
        """leave: called at the end, where this process is one rank of several that another program started."""
        self._runner: Runner | None = runner
        self._leave = leave
        self.num_blocks = runner.num_blocks

    def execute(self, plan: SchedulerOutput) -> PendingStep:
        assert self._runner is not None, "the executor is closed"
        return self._runner.execute(plan)

    def apply(self, function: Callable[[Any], Any]) -> list[Any]:
        """What function(runner) returns, for each worker."""
        assert self._runner is not None, "the executor is closed"
        return [function(self._runner)]

    def close(self) -> None:
        """Free weights and KV cache. May be called twice."""
        if self._runner is None:
            return
        device = self._runner.device
        self._runner = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        if self._leave is not None:
            self._leave()
