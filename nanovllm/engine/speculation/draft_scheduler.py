"""DraftModelScheduler: drafts come from a model on the device, by a step of its own before the one that verifies them.

Owns what the draft model has to compute. It keeps keys in blocks of the same numbers as the target's; what it has not
seen of a request, a prompt that it meets for the first time or tokens that were decoded plainly, it computes when it is
asked, in parts if these are many. Invariant: of a request's tokens, the draft model's keys are right for the first
`_num_drafted`; behind these may stand those of tokens that were not accepted.
"""

from collections.abc import Mapping
from typing import Any

from nanovllm.engine.ends import FindStopString, no_stop_string
from nanovllm.engine.request import End, Request
from nanovllm.engine.scheduler import PlannedStep
from nanovllm.engine.scheduler_output import ModelRunnerOutput, NewRow, SchedulerOutput
from nanovllm.engine.speculation.scheduler import SpeculativeScheduler, VerifyingStep, can_draft
from nanovllm.sampling_params import SamplingParams

_GREEDY = SamplingParams(temperature=0)


class DraftModelScheduler(SpeculativeScheduler):
    def __init__(self, *args: Any, reads_ahead: int = 0, **options: Any) -> None:
        """reads_ahead: 1 where the model reads, at each position, the token behind it beside the target's states there.
        What it computes further ahead has other states, and is computed anew once they are known.
        """
        self._reads_ahead = reads_ahead
        super().__init__(*args, **options)

    def _clear(self) -> None:
        super()._clear()
        self._asked: list[Request] | None = None  # for whom drafts are on their way
        self._ready: dict[Request, list[int]] = {}
        self._num_drafted: dict[Request, int] = {}

    def finish(self, request: Request, end: End) -> None:
        super().finish(request, end)
        self._num_drafted.pop(request, None)

    def _preempt(self, request: Request) -> None:
        super()._preempt(request)
        self._num_drafted.pop(request, None)

    # -- the step that drafts --

    def schedule(self) -> SchedulerOutput | None:
        if self._asked is not None:
            return None
        if not self._ready and not self._is_verifying() and self._is_drafting():
            if self._planned:
                return None
            plan = self._plan_drafts()
            if plan is not None:
                return plan
        plan = super().schedule()
        self._ready = {}
        return plan

    def _make_drafts(self) -> Mapping[Request, list[int]]:
        return {request: draft for request, draft in self._ready.items() if request.num_uncomputed_tokens == 1}

    def _plan_drafts(self) -> SchedulerOutput | None:
        """As many tokens for each as is worth the while; none for those that may not have as many."""
        drafting = [r for r in self.running if r.num_uncomputed_tokens == 1 and can_draft(r)]
        most = max((r.max_total_tokens - len(r.token_ids) - 1 for r in drafting), default=0)
        length = min(most, self._pace.length(drafting, len(self.running)))
        if length < 1:
            return None
        budget, chosen = self.max_num_batched_tokens, []
        for request in drafting:
            num_new = min(self._num_missing(request), budget)
            if num_new and len(request.token_ids) + length < request.max_total_tokens:
                blocks = self.cache.allocate(request, 1 + length)
                if blocks is not None:
                    chosen.append((request, num_new, blocks))
                    budget -= num_new
        chosen.sort(key=lambda item: item[1] > 1)
        if not chosen:
            return None
        plan = SchedulerOutput(
            new_rows=[],
            new_blocks=[],
            num_decodes=sum(num_new == 1 for _, num_new, _ in chosen),
            num_draft_steps=length,
        )
        self._asked = []
        self._is_catching_up = any(num_new > 1 + self._pace.most for _, num_new, _ in chosen)
        for request, num_new, blocks in chosen:
            start = self._num_drafted.get(request, 0)
            end = start + num_new
            is_last = end == len(request.token_ids) - self._reads_ahead
            plan.new_rows.append(_entering(request, start))
            plan.new_blocks.extend((request.row, *block) for block in blocks)
            plan.rows.append(request.row)
            plan.num_scheduled_tokens.append(num_new)
            plan.num_computed_tokens.append(start)
            plan.num_samples.append(int(is_last))
            plan.token_ids.extend(request.token_ids[start + self._reads_ahead : end + self._reads_ahead])
            self._num_drafted[request] = end
            if is_last:
                self._asked.append(request)
        return plan

    def _num_missing(self, request: Request) -> int:
        """Of the request's tokens that the host knows, how many the draft model has not seen."""
        return len(request.token_ids) - self._reads_ahead - self._num_drafted.get(request, 0)

    # -- its result, and that of the step that verifies --

    def update(self, output: ModelRunnerOutput, find_stop_string: FindStopString = no_stop_string) -> list[Request]:
        if self._asked is None:
            return super().update(output, find_stop_string)
        drafts = zip(self._asked, output.token_ids, strict=True)
        self._ready = {request: draft for request, draft in drafts if request.is_running}
        self._asked = None
        return []

    def _take_in(self, step: PlannedStep, output: ModelRunnerOutput, find_stop_string: FindStopString) -> list[Request]:
        if isinstance(step, VerifyingStep) and not step.plan.num_draft_steps and not self._reads_ahead:
            for request, token_ids in zip(step.sampled, output.token_ids, strict=True):
                num_drafted = step.num_drafted.get(request)
                if num_drafted is not None and request in self._num_drafted:
                    # The model has keys of the draft but for its last token.
                    self._num_drafted[request] += min(len(token_ids), num_drafted) - 1
        return super()._take_in(step, output, find_stop_string)


def _entering(request: Request, num_computed: int) -> NewRow:
    """The row as the draft model sees it in each of its steps: its blocks are there, its length is not."""
    return NewRow(
        row=request.row,
        num_computed_tokens=num_computed,
        num_prompt_tokens=request.num_prompt_tokens,
        block_ids=[],
        params=_GREEDY,
        seed=0,
        stop_token_ids=(),
    )
