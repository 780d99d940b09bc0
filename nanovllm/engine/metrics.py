"""What an engine counts: steps, tokens, and where time goes.

Owns the names of `LLM.get_metrics`. Invariant: counters only rise, but for those that say how things are now.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.engine.scheduler import Scheduler


@dataclass(slots=True)
class SchedulerStats:
    """Counted when a step is planned. Of what a step reads and multiplies, these depend on the requests."""

    num_preemptions: int = 0
    num_prompt_tokens_cached: int = 0
    num_tokens_computed: int = 0
    num_tokens_sampled: int = 0
    num_context_tokens_read: int = 0  # each request's context, its new tokens included, once a step
    num_query_key_pairs: int = 0  # each new token with its whole context

    def counters(self) -> dict[str, float]:
        return asdict(self)


@dataclass
class EngineTimes:
    num_steps: int = 0
    host_seconds: float = 0.0  # planning and taking in results
    execute_seconds: float = 0.0  # queueing steps; on a CPU this is where they run
    wait_seconds: float = 0.0  # waiting for the device


def engine_metrics(scheduler: "Scheduler", times: EngineTimes) -> dict[str, float]:
    """See `LLM.get_metrics`."""
    return {
        **scheduler.stats.counters(),
        "num_running": len(scheduler.running),
        "num_waiting": len(scheduler.waiting),
        "num_free_blocks": scheduler.cache.pool.num_free_blocks,
        "num_blocks": scheduler.cache.pool.num_blocks,
        **getattr(scheduler.cache, "counts", {}),  # of the tiers below it, where there are any
        **asdict(times),
    }
