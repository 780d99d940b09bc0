"""What the engine asks of others. Protocols only; `executor/` and `structured/` hold the implementations."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nanovllm.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput

if TYPE_CHECKING:
    from nanovllm.engine.engine import Engine
    from nanovllm.engine.output_processor import OutputProcessor
    from nanovllm.engine.request import Request


class PendingStep(Protocol):
    """A step that has been queued on the device."""

    def result(self) -> ModelRunnerOutput:
        """Wait for the step and return what it sampled. The only wait in the engine."""
        ...


class Executor(Protocol):
    """Runs plans in the order given, on one stream: a later plan may reuse the blocks an earlier one read."""

    num_blocks: int

    def execute(self, plan: SchedulerOutput) -> PendingStep: ...

    def apply(self, function: Callable[[Any], Any]) -> list[Any]:
        """What function(runner) returns, for each worker."""
        ...

    def close(self) -> None: ...


class SteppedEngine(Protocol):
    """`Engine`, or `DataParallelEngine`. planner: the engine that plans, if it is in this process."""

    output_processor: "OutputProcessor"

    @property
    def planner(self) -> "Engine | None": ...

    def add_request(self, request: "Request") -> None: ...

    def abort(self, request: "Request") -> None: ...

    def has_work(self) -> bool: ...

    def step(self) -> list["Request"]: ...

    def restart(self, requests: Iterable["Request"]) -> None: ...

    def close(self) -> None: ...


class TokenConstraint(Protocol):
    """A form that one sequence must have. It sees each token before the next one can be planned.

    error: why it cannot go on, once it has met a limit of its library; None as long as all is well.
    """

    error: str | None

    def advance(self, token_id: int) -> bool:
        """Take the sequence's next token. Returns whether the form is complete, so that nothing can follow."""
        ...

    def restart(self, token_ids: Sequence[int]) -> None:
        """Begin anew, with these output tokens taken."""
        ...

    def retract(self, num_tokens: int) -> bool:
        """Give back the last tokens taken; whether it could. If not, it is to be restarted."""
        ...

    def bitmasks(self, constraints: Sequence[Any]) -> np.ndarray:
        """Which tokens may come next in each of these (itself among them), [n, words] as `grammar_bitmask` has them.

        One that meets a limit says so in its `error`; its own mask then means nothing.
        """
        ...
