"""StepParts: a step that runs as two, so that its decodes have their CUDA graph.

Owns cutting the plan, and putting the results in its order again; `GraphRunner._parts` says who runs apart. Invariant:
the rest are decodes, which read nothing that the step computes for others, so they may go first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.engine.interfaces import PendingStep
from nanovllm.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput


@dataclass(frozen=True)
class StepParts:
    """is_own_token: of each request that the whole step samples for, whether `own` samples it."""

    own: SchedulerOutput
    rest: SchedulerOutput
    is_own_token: list[bool]


def split(plan: SchedulerOutput, is_own: Sequence[bool]) -> StepParts:
    """is_own: of each of the plan's requests."""
    own, rest = (plan.select([i for i, is_it in enumerate(is_own) if is_it is which]) for which in (True, False))
    return StepParts(own, rest, [is_it for is_it, count in zip(is_own, plan.num_samples, strict=True) if count])


@dataclass(frozen=True)
class PendingParts:
    """The results of a StepParts on their way."""

    own: PendingStep
    rest: PendingStep
    is_own_token: list[bool]

    def result(self) -> ModelRunnerOutput:
        own, rest = self.own.result(), self.rest.result()
        if own.logprobs or rest.logprobs:
            own.logprobs = self._in_order(*(part.logprobs or [None] * len(part.token_ids) for part in (own, rest)))
        if own.failures or rest.failures:
            reasons = self._in_order(*([p.failures.get(i) for i in range(len(p.token_ids))] for p in (own, rest)))
            own.failures = {index: reason for index, reason in enumerate(reasons) if reason is not None}
        own.token_ids = self._in_order(own.token_ids, rest.token_ids)
        return own

    def _in_order(self, own: list[Any], rest: list[Any]) -> list[Any]:
        parts = {True: iter(own), False: iter(rest)}
        return [next(parts[is_own]) for is_own in self.is_own_token]
