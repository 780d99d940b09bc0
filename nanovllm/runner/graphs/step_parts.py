"""StepParts: a step that runs as two, decodes and others, so that its decodes have their CUDA graph.

Owns cutting the plan, and putting the results in its order again; `GraphRunner._parts` says when. Invariant: decodes
read nothing that the step computes for others, so they may go first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.engine.interfaces import PendingStep
from nanovllm.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput


@dataclass(frozen=True)
class StepParts:
    """is_decode: of each request that the whole step samples for, whether `decodes` samples it."""

    decodes: SchedulerOutput
    others: SchedulerOutput
    is_decode: list[bool]


def split(plan: SchedulerOutput, is_decode: Sequence[bool]) -> StepParts:
    """is_decode: of each of the plan's requests."""
    decodes, others = (
        plan.select([i for i, is_it in enumerate(is_decode) if is_it is which]) for which in (True, False)
    )
    sampled = [is_it for is_it, count in zip(is_decode, plan.num_samples, strict=True) if count]
    return StepParts(decodes, others, sampled)


@dataclass(frozen=True)
class PendingParts:
    """The results of a StepParts on their way."""

    decodes: PendingStep
    others: PendingStep
    is_decode: list[bool]

    def result(self) -> ModelRunnerOutput:
        decodes, whole = self.decodes.result(), self.others.result()
        parts = decodes, whole
        if decodes.logprobs or whole.logprobs:
            whole.logprobs = self._in_order(*(part.logprobs or [None] * len(part.token_ids) for part in parts))
        if decodes.failures or whole.failures:
            reasons = self._in_order(*([p.failures.get(i) for i in range(len(p.token_ids))] for p in parts))
            whole.failures = {index: reason for index, reason in enumerate(reasons) if reason is not None}
        whole.token_ids = self._in_order(decodes.token_ids, whole.token_ids)
        return whole

    def _in_order(self, decodes: list[Any], others: list[Any]) -> list[Any]:
        parts = {True: iter(decodes), False: iter(others)}
        return [next(parts[is_decode]) for is_decode in self.is_decode]
