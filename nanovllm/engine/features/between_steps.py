"""BetweenSteps: what is asked of an engine, or changed in it, between two of its steps.

Owns no state; a part of `Engine`, for what few callers want. Invariant: it is called inside the turn, while no step is
being planned.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nanovllm.engine.metrics import EngineTimes, engine_metrics

if TYPE_CHECKING:
    from nanovllm.engine.interfaces import Executor
    from nanovllm.engine.scheduler import Scheduler


class BetweenSteps:
    # What `Engine` has.
    scheduler: "Scheduler"
    executor: "Executor"
    times: EngineTimes

    def apply_model(self, function: Callable[[Any], Any]) -> list[Any]:
        """What function(model) returns, for each worker."""
        return self.executor.apply_model(function)

    def get_metrics(self) -> dict[str, float]:
        """See `LLM.get_metrics`."""
        return engine_metrics(self.scheduler, self.times)

    def reset_prefix_cache(self) -> None:
        self.scheduler.cache.pool.forget_cached()
