"""What the engine asks of whoever runs the model. Protocols only; `executor/` holds the implementations."""

from collections.abc import Callable
from typing import Any, Protocol

from nanovllm.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput


class PendingStep(Protocol):
    """A step that has been queued on the device."""

    def result(self) -> ModelRunnerOutput:
        """Wait for the step and return what it sampled. The only wait in the engine."""
        ...


class Executor(Protocol):
    """Runs plans in the order given, on one stream: a later plan may reuse the blocks an earlier one read."""

    num_blocks: int

    def execute(self, plan: SchedulerOutput) -> PendingStep: ...

    def apply_model(self, function: Callable[[Any], Any]) -> list[Any]: ...

    def close(self) -> None: ...
