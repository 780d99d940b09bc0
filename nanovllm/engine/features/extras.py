"""Extras: what a step brings beside tokens, to the requests that asked for it.

Owns whose prompts a step scores and whose hidden states it brings, as the plan has them. Invariant: what a request asks
for reaches it in the order of its tokens, also when its steps overlap.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from nanovllm.engine.features.capture import Capture
from nanovllm.engine.features.scoring import Scoring
from nanovllm.engine.request import Request
from nanovllm.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput


@dataclass(slots=True)
class Extras:
    """scored: in the order of the plan's prompt_logprobs. captured: with the first of their tokens in this step."""

    scored: list[Scoring] = field(default_factory=list)
    captured: list[tuple[Request, Capture, int]] = field(default_factory=list)

    def plan(self, plan: SchedulerOutput, request: Request, start: int, end: int) -> None:
        """Ask for what belongs to the request's tokens from start to end; the plan's last row is the request's."""
        if request.scoring is not None and request.scoring.plan(plan, request, end):
            self.scored.append(request.scoring)
        if request.capture is not None:
            plan.capture_layers[request.row] = request.capture.layers
            self.captured.append((request, request.capture, start))

    def take(self, sampled: Sequence[Request], output: ModelRunnerOutput) -> None:
        """sampled: the requests for which the step samples."""
        for scoring, entries in zip(self.scored, output.prompt_logprobs, strict=True):
            scoring.logprobs.extend(entries)
        for (request, capture, start), states in zip(self.captured, output.hidden_states, strict=True):
            if not request.is_finished:
                capture.take(start, states)
        logprobs = iter(output.logprobs)  # none if nobody asked
        for request, token_ids in zip(sampled, output.token_ids, strict=True) if output.logprobs else ():
            for entry in islice(logprobs, len(token_ids)):
                if entry is not None and not request.is_finished:
                    request.logprobs.append(entry)
