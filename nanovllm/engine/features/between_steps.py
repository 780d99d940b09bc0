"""BetweenSteps: what is asked of an engine, or changed in it, between two of its steps.

Owns no state; a part of `Engine`, for what few callers want. Invariant: it is called inside the turn, while no step is
being planned.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from nanovllm.engine.metrics import EngineTimes, engine_metrics
from nanovllm.engine.request import End, Request

if TYPE_CHECKING:
    from nanovllm.engine.engine import Engine
    from nanovllm.engine.interfaces import Executor, PendingStep
    from nanovllm.engine.scheduler import Scheduler


@dataclass(frozen=True)
class OnModel:
    """A function of a model, for who has its runner; it can be sent to another process."""

    function: Callable[[Any], Any]

    def __call__(self, runner: Any) -> Any:
        return self.function(runner.model)


class BetweenSteps:
    # What `Engine` has.
    scheduler: "Scheduler"
    executor: "Executor"
    times: EngineTimes
    _in_flight: "deque[PendingStep]"

    _caught_up: list[Request]  # requests that got a token, or ended, while a step was being queued
    is_paused = False  # it plans no step then, and comes to the end of those in flight

    def catch_up(self) -> None:
        """Take in all steps in flight, while another one is being queued."""
        start = perf_counter()
        while self._in_flight:
            self._caught_up += self.planner._collect()
        self.times.execute_seconds -= perf_counter() - start  # in which this is

    @property
    def planner(self) -> "Engine":
        return cast("Engine", self)

    def apply_model(self, function: Callable[[Any], Any]) -> list[Any]:
        """What function(model) returns, for each worker."""
        return self.executor.apply(OnModel(function))

    def get_metrics(self) -> dict[str, float]:
        """See `LLM.get_metrics`."""
        return engine_metrics(self.scheduler, self.times)

    def abort(self, request: Request) -> None:
        self.scheduler.finish(request, End("abort"))

    def restart(self, requests: Iterable[Request]) -> None:
        """After an interrupted step: drop what is in flight and let `requests`, the unfinished ones, begin again."""
        self._in_flight.clear()
        self.scheduler.restart(requests)

    def reset_prefix_cache(self) -> None:
        self.scheduler.cache.pool.forget_cached()
