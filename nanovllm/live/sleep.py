"""What an engine does to fall asleep and to wake up, where it plans and on its workers.

Owns these commands; the memory is `runner/sleeping.py`'s, and who may generate when is `live/surface.py`'s. Invariant:
nobody finds a block, and nobody keeps one, of a KV cache whose memory was given back.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.engine.features.restart import preempt_all
from nanovllm.engine.session import Session
from nanovllm.live.in_flight import drain

TAGS = ("weights", "kv_cache")


def read_level(level: Any) -> int:
    if level not in (1, 2) or isinstance(level, bool):
        raise ValueError(f"level must be 1 (weights are kept in the host's memory) or 2 (they are not), got {level!r}")
    return int(level)


def read_tags(tags: Any) -> Sequence[str]:
    """None: all of them."""
    if tags is None:
        return TAGS
    if isinstance(tags, str) or not isinstance(tags, Collection) or not set(tags) <= set(TAGS):
        raise ValueError(f"tags must be a list of 'weights' and 'kv_cache', got {tags!r}")
    return tuple(tags)


@dataclass(frozen=True)
class FallAsleep:
    """Where an engine plans, paused: requests in flight lose their blocks, and the workers their memory."""

    keeps_weights: bool

    def __call__(self, session: Session) -> None:
        engine = session.engine.planner
        assert engine is not None
        drain(session)
        preempt_all(engine.scheduler)
        engine.reset_prefix_cache()
        engine.executor.apply(GiveBack(self.keeps_weights))


@dataclass(frozen=True)
class GiveBack:
    keeps_weights: bool

    def __call__(self, runner: Any) -> None:
        if hasattr(runner.model, "adapters"):
            runner.model.adapters.forget_slots()
        runner.model.sleeper.sleep(self.keeps_weights)


@dataclass(frozen=True)
class TakeBack:
    tags: Sequence[str]

    def __call__(self, runner: Any) -> None:
        runner.model.sleeper.wake(self.tags)
