"""ChainedScheduler: drafts and their verification in one step, planned before the host knows where it begins.

Owns when the device goes on alone. A step of this kind begins where the one before ended on the device: with the tokens
that were accepted there, it drafts behind them, and verifies. So the host reads a result while the next step runs. What
it has to see first breaks the chain: prompts, preemption, requests whose tokens are drawn one by one; for these steps,
drafting and verification are planned apart, by what the host knows.

    host      plan 1 | plan 2 | read 1, plan 3 | read 2, plan 4 | ...
    device           | draft, verify 1 | draft, verify 2 | draft, verify 3 ...

Invariant: a request holds blocks for every token that a step in flight may compute, whatever is accepted.
"""

from typing import Any

from nanovllm.engine.ends import FindStopString
from nanovllm.engine.request import End, Request
from nanovllm.engine.scheduler import PlannedStep
from nanovllm.engine.scheduler_output import ModelRunnerOutput, NewRow, SchedulerOutput
from nanovllm.engine.speculation.draft_scheduler import DraftModelScheduler
from nanovllm.engine.speculation.scheduler import VerifyingStep, can_draft

MOST_PLACES = 256  # tokens of such a step: each has logits in the memory of CUDA graphs


class ChainedScheduler(DraftModelScheduler):
    def __init__(self, *args: Any, num_unseen: int, **options: Any) -> None:
        """num_unseen: of a request, how many tokens such a step can show the draft model before it drafts."""
        self._num_unseen = num_unseen
        super().__init__(*args, **options)

    def _clear(self) -> None:
        super()._clear()
        self._chained: set[Request] = set()  # whose last step was of this kind, so that the device can go on

    def finish(self, request: Request, end: End) -> None:
        super().finish(request, end)
        self._chained.discard(request)

    def _preempt(self, request: Request) -> None:
        super()._preempt(request)
        self._chained.discard(request)

    # -- planning --

    def schedule(self) -> SchedulerOutput | None:
        if self._asked is None and not self._ready and self._is_drafting():
            plan = self._plan_chained()
            if plan is not None:
                return plan
        return super().schedule()

    def _plan(
        self,
        scheduled: list[tuple[Request, int]],
        new_rows: list[NewRow],
        new_blocks: list[tuple[int, int, int]],
    ) -> SchedulerOutput:
        self._chained.difference_update(request for request, _ in scheduled)
        return super()._plan(scheduled, new_rows, new_blocks)

    def _plan_chained(self) -> SchedulerOutput | None:
        """None where the host has to see more first, or drafts are not worth the while."""
        requests = [request for request in self.running if request.num_uncomputed_tokens]
        if not requests or self._has_room_for_more() or not all(map(self._can_go_on, requests)):
            return None
        most_places = min(self.max_num_batched_tokens, MOST_PLACES)
        length = min(self._pace.length(requests, len(requests)), most_places // len(requests) - 1)
        num_drafted = {r: max(0, min(length, r.max_total_tokens - r.num_tokens - 1)) for r in requests}
        if not any(num_drafted.values()) or not self._has_blocks(num_drafted):
            return None
        plan = SchedulerOutput(new_rows=[], new_blocks=[], num_decodes=0, num_draft_steps=length)
        unseen: dict[int, list[int]] = {}
        for request, num in num_drafted.items():
            blocks = self.cache.allocate(request, 1 + num)
            assert blocks is not None, "there were enough"
            plan.new_blocks.extend((request.row, *block) for block in blocks)
            plan.rows.append(request.row)
            plan.num_scheduled_tokens.append(1 + num)
            plan.num_computed_tokens.append(request.num_computed_tokens)
            plan.num_samples.append(1 + num)
            plan.token_ids.extend([-1] * (1 + num))
            if request not in self._chained:
                unseen[request.row] = request.token_ids[-max(1, self._num_missing(request)) :]
            end = request.num_computed_tokens + 1 + num
            self.stats.num_context_tokens_read += end
            self.stats.num_query_key_pairs += (1 + num) * (request.num_computed_tokens + 1 + end) // 2
            request.num_computed_tokens += 1
            request.num_pending_tokens += 1
        plan.unseen_tokens, plan.num_draft_tokens = unseen, sum(num_drafted.values())
        drafting = {request: num for request, num in num_drafted.items() if num}
        self.stats.num_tokens_computed += len(requests)
        self.stats.num_tokens_sampled += len(requests)
        self._planned.append(VerifyingStep(requests, plan, num_drafted=drafting))
        self._count_drafts(drafting)
        self._chained.update(requests)
        return plan

    def _can_go_on(self, request: Request) -> bool:
        """Is it one token that comes next, drawn from its logits as they are, behind what the device can know?"""
        params = request.params
        is_plain = not (params.edits_logits or request.needs_history or request.needs_host_tokens)
        if request.num_uncomputed_tokens > 1 or not is_plain or params.logprobs is not None or request.adapter:
            return False
        if request in self._chained:
            return True
        return can_draft(request) and not request.num_pending_tokens and self._num_missing(request) <= self._num_unseen

    def _has_blocks(self, num_drafted: dict[Request, int]) -> bool:
        size = self.cache.block_size
        needed = (-(-(r.num_computed_tokens + 1 + num) // size) - len(r.block_ids[0]) for r, num in num_drafted.items())
        return sum(max(0, num) for num in needed) <= self.cache.pool.num_free_blocks

    # -- after a step --

    def _take_in(self, step: PlannedStep, output: ModelRunnerOutput, find_stop_string: FindStopString) -> list[Request]:
        if isinstance(step, VerifyingStep) and step.plan.num_draft_steps:
            for request, token_ids in zip(step.sampled, output.token_ids, strict=True):
                if request.is_running:  # the draft model has seen all tokens before this step's, and its own but one
                    num_seen = 0 if self._reads_ahead else min(len(token_ids), step.plan.num_draft_steps) - 1
                    self._num_drafted[request] = len(request.token_ids) - self._reads_ahead + num_seen
        return super()._take_in(step, output, find_stop_string)
