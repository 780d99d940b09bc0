"""SpeculativeScheduler: a Scheduler whose requests may bring drafts into a step, to be verified all at once.

Owns which drafts a step carries, and what the counters say until it is known how many were accepted. A request with a
draft of k tokens computes 1 + k tokens, and the device draws 1 + k, each as it would have been drawn alone, with the
random numbers of its own position. It keeps those before the first that differs from the draft, and that one.

    token_ids ... t | d1 d2 d3      drawn behind t, d1 and d2:  d1 d2 x      x is not d3: d3's KV will be overwritten

Invariants: until the result is there the counters are upper bounds, and nothing is planned that needs to know more;
blocks that others may find hold accepted tokens only; a request never gives up a block, or its place in a step, for
somebody's draft.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from nanovllm.engine.cache_manager import CacheManager
from nanovllm.engine.ends import FindStopString, no_stop_string
from nanovllm.engine.features.constraints import draft_bitmasks
from nanovllm.engine.request import End, Request
from nanovllm.engine.scheduler import PlannedStep, Scheduler
from nanovllm.engine.scheduler_output import ModelRunnerOutput, NewRow, SchedulerOutput
from nanovllm.engine.speculation.pace import Pace
from nanovllm.engine.speculation.proposer import Proposals
from nanovllm.engine.speculation.stats import SpeculationStats


@dataclass(slots=True, kw_only=True)
class VerifyingStep(PlannedStep):
    """num_drafted: of requests for which the step samples, how many tokens of a draft it verifies."""

    num_drafted: Mapping[Request, int]


class SpeculativeScheduler(Scheduler):
    stats: SpeculationStats

    def __init__(
        self,
        cache: CacheManager,
        *,
        proposals: Proposals | None,
        pace: Pace,
        most_requests: int,
        **options: Any,
    ) -> None:
        """proposals: None where drafts come from elsewhere. most_requests: with more running, nothing is drafted.
        options: as for any scheduler.
        """
        self._proposals, self._pace, self._most_requests = proposals, pace, most_requests
        super().__init__(cache, **options)
        self.stats = SpeculationStats(accepted_per_position=[0] * pace.most)

    def _clear(self) -> None:
        super()._clear()
        self._drafts: Mapping[Request, list[int]] = {}  # for the step that is being planned
        self._is_catching_up = False  # did its drafts take more work than such drafts do?
        if self._proposals is not None:
            self._proposals.clear()
        self._pace.clear()

    def finish(self, request: Request, end: End) -> None:
        super().finish(request, end)
        if self._proposals is not None:
            self._proposals.forget(request)
        self._pace.forget(request)

    # -- planning --

    def schedule(self) -> SchedulerOutput | None:
        """None also while the host has to see more before drafts can be made."""
        if self._is_verifying():
            return None
        if self._is_drafting():
            if self._planned:
                return None
            self._drafts = self._make_drafts()
            if self._drafts:
                self._steady = None
        plan = super().schedule()
        self._drafts = {}
        return plan

    def _is_verifying(self) -> bool:
        return any(isinstance(step, VerifyingStep) for step in self._planned)

    def _is_drafting(self) -> bool:
        num_running = len(self.running)
        return 0 < num_running <= self._most_requests and self._pace.decide(num_running) and not self._has_prompts()

    def _has_prompts(self) -> bool:
        """Will the next step compute prompts? Beside these drafts gain little, and the mixture is not captured."""
        if not self._pace.is_adaptive:
            return False
        return self.running[-1].num_uncomputed_tokens > 1 or self._has_room_for_more()

    def _has_room_for_more(self) -> bool:
        room = self.cache.pool.num_free_blocks * self.cache.block_size
        return bool(self.waiting and self._free_rows and self.waiting[0].num_tokens <= room)

    def _make_drafts(self) -> Mapping[Request, list[int]]:
        """Of running requests that decode, as long as is worth the while."""
        drafts: dict[Request, list[int]] = {}
        assert self._proposals is not None
        for request in self.running:
            most = min(self._pace.most, request.max_total_tokens - len(request.token_ids) - 1)
            if request.num_uncomputed_tokens == 1 and can_draft(request):
                draft = self._proposals.propose(request, most)
                if draft:
                    drafts[request] = draft
        cap = self._pace.shorten(drafts, len(self.running)) if drafts else 0
        return {request: draft[:cap] for request, draft in drafts.items()} if cap else {}

    def _plan(
        self,
        scheduled: list[tuple[Request, int]],
        new_rows: list[NewRow],
        new_blocks: list[tuple[int, int, int]],
    ) -> SchedulerOutput:
        """Drafts come last: they get what tokens and blocks have left."""
        drafts: dict[Request, list[int]] = {}
        budget = self.max_num_batched_tokens - sum(num_new for _, num_new in scheduled)
        for request, num_new in scheduled if self._drafts else ():
            draft = self._drafts.get(request, [])[:budget]
            if draft and num_new == 1 and (blocks := self.cache.allocate(request, 1 + len(draft))) is not None:
                new_blocks.extend((request.row, *block) for block in blocks)
                drafts[request] = draft
                budget -= len(draft)
        plan = super()._plan(scheduled, new_rows, new_blocks)
        return self._add_drafts(plan, drafts) if drafts else plan

    def _add_drafts(self, plan: SchedulerOutput, drafts: dict[Request, list[int]]) -> SchedulerOutput:
        """The plan, in which each of these requests has one token, with their drafts behind it."""
        step = self._planned[-1]
        masks = {}
        for request in [request for request in drafts if request.constraint is not None]:
            masks[request.row] = draft_bitmasks(request, drafts[request], plan.grammar_bitmask[request.row])
        draft_of_row = {request.row: draft for request, draft in drafts.items() if draft}
        singles = [i for i in range(plan.num_decodes) if plan.rows[i] not in draft_of_row]
        drafting = [i for i in range(plan.num_decodes) if plan.rows[i] in draft_of_row]
        if not drafting:
            return plan
        plan.shared_prefixes = []  # of decodes in another order
        order = [*singles, *drafting, *range(plan.num_decodes, len(plan.rows))]
        if order != list(range(len(order))):
            plan = plan.select(order)
        plan.num_decodes = len(singles)
        token_ids = plan.token_ids[: len(singles)]
        for index in range(len(singles), len(singles) + len(drafting)):
            draft = draft_of_row[plan.rows[index]]
            plan.num_scheduled_tokens[index] += len(draft)
            plan.num_samples[index] += len(draft)
            token_ids += [plan.token_ids[index], *draft]
        plan.token_ids = token_ids + plan.token_ids[len(singles) + len(drafting) :]
        plan.grammar_bitmask = {**plan.grammar_bitmask, **masks}
        plan.num_draft_tokens = sum(map(len, draft_of_row.values()))
        of_row = {request.row: request for request in step.sampled}
        sampled = [of_row[row] for row, count in zip(plan.rows, plan.num_samples, strict=True) if count]
        num_drafted = {request: len(draft) for request, draft in drafts.items() if draft}
        self._planned[-1] = VerifyingStep(sampled, plan, step.extras, num_drafted=num_drafted)
        self._count_drafts(num_drafted)
        return plan

    def _count_drafts(self, num_drafted: Mapping[Request, int]) -> None:
        """The step just planned computes as many tokens more, and may sample as many."""
        for request, num in num_drafted.items():
            request.num_computed_tokens += num
            request.num_pending_tokens += num
        self.stats.num_tokens_computed += sum(num_drafted.values())
        self._steady = None

    # -- after a step --

    def update(self, output: ModelRunnerOutput, find_stop_string: FindStopString = no_stop_string) -> list[Request]:
        plan = self._planned[0].plan
        is_decode = len(plan.token_ids) == sum(plan.num_samples) and not self._is_catching_up
        self._is_catching_up = False
        changed = super().update(output, find_stop_string)
        if len(plan.rows) <= self._most_requests:
            num_emitted = sum(map(len, output.token_ids))
            self._pace.note_step(len(plan.rows), len(plan.token_ids), num_emitted, is_decode)
            if not self._pace.is_on and self._proposals is not None:
                for request in changed:
                    if request.is_running and can_draft(request):
                        self._pace.compare(request, self._proposals.propose)
        return changed

    def _take_in(self, step: PlannedStep, output: ModelRunnerOutput, find_stop_string: FindStopString) -> list[Request]:
        if not isinstance(step, VerifyingStep):
            return super()._take_in(step, output, find_stop_string)
        ended, rejected = [], {}
        for index, (request, token_ids) in enumerate(zip(step.sampled, output.token_ids, strict=True)):
            num_drafted = step.num_drafted.get(request)
            if num_drafted is None:
                continue
            num_accepted = len(token_ids) - 1
            request.num_pending_tokens -= num_drafted
            if request.is_running:
                rejected[request.row] = num_drafted - num_accepted
                request.num_computed_tokens -= rejected[request.row]
            self.stats.count_draft(num_drafted, num_accepted)
            self.stats.num_tokens_sampled += num_accepted
            self._pace.note_draft(request, num_drafted, num_accepted)
            if index in output.failures:
                ended += self._take_before_failure(request, token_ids[:-1], find_stop_string)
        for later in islice(self._planned, 1, None):
            _correct(later.plan, rejected)
        changed = super()._take_in(step, output, find_stop_string)
        for request in step.num_drafted:
            if request.is_finished:  # maybe by a token before the last
                del request.logprobs[len(request.token_ids) - request.num_prompt_tokens :]
        return changed + ended

    def _take_before_failure(
        self, request: Request, token_ids: list[int], find_stop_string: FindStopString
    ) -> list[Request]:
        """Tokens that came before nothing could be sampled any more. Returns the request, if one of them ended it."""
        for token_id in token_ids:
            if not request.is_finished:
                self._take_token(request, token_id, find_stop_string)
        return [request] if request.is_finished and token_ids else []


def _correct(plan: SchedulerOutput, rejected: Mapping[int, int]) -> None:
    """The counters of a step that was planned by upper bounds; rejected: by row, by how many these were too high."""
    starts = zip(plan.rows, plan.num_computed_tokens, strict=True)
    plan.num_computed_tokens = [start - rejected.get(row, 0) for row, start in starts]


def can_draft(request: Request) -> bool:
    """Not where keys depend on the context's length, nor where every token's hidden states are asked for."""
    return request.context is None and request.capture is None
