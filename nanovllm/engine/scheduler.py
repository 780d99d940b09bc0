"""Scheduler: what runs in the next step, and what a finished step means for each request.

Owns the waiting and running queues, rows and the requests' counters; no block (`cache_manager.py`), tensor or text.
There are no phases: a request has tokens and computed tokens, and a step computes some of the difference. Prefill,
decode, chunked prefill and the return of a preempted request are that one rule.

Invariants: the counters move when a step is planned, so the next step can be planned before this one has run; steps run
in the order they were planned, so blocks freed now may be handed out now; a preempted request comes back only when the
host has read every token of it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from time import monotonic

from nanovllm.engine.cache_manager import CacheManager
from nanovllm.engine.ends import FindStopString, find_end, no_stop_string
from nanovllm.engine.features.constraints import masks_of, nothing
from nanovllm.engine.features.context_length import become_long
from nanovllm.engine.features.extras import Extras
from nanovllm.engine.features.restart import begin_anew, take_back
from nanovllm.engine.metrics import SchedulerStats
from nanovllm.engine.request import End, Request
from nanovllm.engine.scheduler_output import ModelRunnerOutput, NewRow, SchedulerOutput
from nanovllm.engine.shared_prefixes import SharedPrefixes
from nanovllm.engine.steady_decode import SteadyDecode


@dataclass(slots=True)
class PlannedStep:
    """What is remembered of a step in flight, until its results come."""

    sampled: list[Request]  # for which it samples
    plan: SchedulerOutput
    extras: Extras = field(default_factory=Extras)


class Scheduler:
    """First come, first served, under a token budget per step (`max_num_batched_tokens`) and a row limit.

    max_num_batched_tokens must be at least max_num_seqs: every running request then gets a token in every step; and
    without chunked prefill as much as any request can have: it then gets its turn once few enough others run.
    """

    def __init__(
        self,
        cache: CacheManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_chunked_prefill: bool = True,
        shared_prefixes: SharedPrefixes | None = None,
        admits: Callable[[Request, Sequence[Request]], bool] = lambda request, running: True,
    ) -> None:
        """shared_prefixes: where the device reads at once what decodes share. admits(request, running): may it enter,
        as far as more than rows, tokens and blocks are concerned? If so, it does.
        """
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_chunked_prefill = enable_chunked_prefill
        self.stats = SchedulerStats()
        self._shared_prefixes = shared_prefixes
        self._admits, self.catch_up = admits, nothing
        self._clear()

    def _clear(self) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission; the last one is the newest
        self._free_rows = list(range(self.max_num_seqs - 1, -1, -1))
        self._planned: deque[PlannedStep] = deque()  # the steps in flight, oldest first
        self._steady: SteadyDecode | None = None

    # -- what enters and leaves --

    def add_request(self, request: Request) -> None:
        self.waiting.append(request)

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def finish(self, request: Request, end: End) -> None:
        """End a request at any point. What a step in flight still samples for it is dropped when it arrives."""
        if request.is_finished:
            return
        if request.is_running:
            self._steady = None
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)
        request.end = end

    def restart(self, requests: Iterable[Request]) -> None:
        """Forget all plans and blocks; those of `requests` that have not ended wait again, in order, without KV.

        For a step that was interrupted anywhere: lists may be half changed, blocks published that were never written,
        and some of a step's tokens taken in. They are given back, and sampled again.
        """
        if self._planned:
            take_back(self._planned[0].sampled, self._planned[0].plan, self.cache.block_size)
        self.cache.clear()
        self._clear()
        self.waiting.extend(begin_anew(requests))

    # -- planning a step --

    def schedule(self) -> SchedulerOutput | None:
        """Plan the next step and advance the counters; None if there is nothing to compute now."""
        if self._steady is not None and (plan := self._schedule_steady(self._steady)) is not None:
            return plan
        self._steady = None
        new_rows: list[NewRow] = []
        new_blocks: list[tuple[int, int, int]] = []
        scheduled: list[tuple[Request, int]] = []
        num_preempted = self.stats.num_preemptions
        budget = self._schedule_running(scheduled, new_blocks)
        if num_preempted == self.stats.num_preemptions:  # else the blocks that came free belong to the running ones
            self._schedule_waiting(budget, scheduled, new_rows, new_blocks)
        return self._plan(scheduled, new_rows, new_blocks) if scheduled else None

    def _schedule_steady(self, steady: SteadyDecode) -> SchedulerOutput | None:
        """One more token for each running request; None where that needs the general rule."""
        out_of_blocks = steady.out_of_blocks()
        if (self.waiting and self._free_rows) or not steady.num_steps_left or not self.cache.has_blocks(out_of_blocks):
            return None
        new_blocks: list[tuple[int, int, int]] = []
        for request in out_of_blocks:
            new_blocks.extend((request.row, *block) for block in self.cache.allocate(request, 1) or ())
        num_reqs = len(steady.rows)
        is_known = not steady.requests[0].num_pending_tokens  # to the host, and then all of them are
        plan = SchedulerOutput(
            new_rows=[],
            new_blocks=new_blocks,
            rows=steady.rows,
            num_scheduled_tokens=[1] * num_reqs,
            num_computed_tokens=[request.num_computed_tokens for request in steady.requests],
            num_samples=[1] * num_reqs,
            token_ids=[request.token_ids[-1] for request in steady.requests] if is_known else [-1] * num_reqs,
            num_decodes=num_reqs,
            shared_prefixes=steady.shared_prefixes,
        )
        steady.count_step()
        self.stats.num_tokens_computed += num_reqs
        self.stats.num_tokens_sampled += num_reqs
        self.stats.num_context_tokens_read += steady.num_context_tokens
        self.stats.num_query_key_pairs += steady.num_context_tokens
        self._planned.append(PlannedStep(steady.requests, plan))
        return plan

    def _schedule_running(self, scheduled: list[tuple[Request, int]], new_blocks: list[tuple[int, int, int]]) -> int:
        """Give each running request its tokens, oldest first; return the budget that is left.

        Each gets one at least: nobody is admitted behind a prompt that is cut, so all but the newest need only one.
        """
        budget = self.max_num_batched_tokens
        index = 0
        while index < len(self.running):
            request = self.running[index]
            num_uncomputed = request.num_uncomputed_tokens
            if num_uncomputed == 0:
                index += 1
                continue
            num_new = min(num_uncomputed, budget)
            while (blocks := self.cache.allocate(request, num_new)) is None:
                newest = self.running[-1]
                self._preempt(newest)
                if newest is request:
                    return budget
            if num_new > 1:
                self.cache.publish(request, request.num_computed_tokens + num_new)  # for those that enter in this step
            new_blocks.extend((request.row, *block) for block in blocks)
            scheduled.append((request, num_new))
            budget -= num_new
            index += 1
        return budget

    def _schedule_waiting(
        self,
        budget: int,
        scheduled: list[tuple[Request, int]],
        new_rows: list[NewRow],
        new_blocks: list[tuple[int, int, int]],
    ) -> None:
        """Admit waiting requests in order while a row, budget and blocks for all their known tokens are free."""
        while self.waiting and self._free_rows and budget > 0:
            request = self.waiting[0]
            if request.num_pending_tokens:
                return  # preempted with a token on the way: it cannot be recomputed before it is read
            prefix = self.cache.find_prefix(request)
            num_uncomputed = request.num_tokens - self.cache.num_tokens(prefix)
            fits = self.enable_chunked_prefill or num_uncomputed <= budget
            if not (fits and self.cache.has_room(request, prefix) and self._admits(request, self.running)):
                return
            self.waiting.popleft()
            self.cache.enter(request, prefix)
            if request.num_cached_tokens is None:
                request.num_cached_tokens = request.num_computed_tokens
                request.begun_at = monotonic()
                self.stats.num_prompt_tokens_cached += request.num_computed_tokens
            request.row = self._free_rows.pop()
            self.running.append(request)
            num_new = min(num_uncomputed, budget)
            allocated = self.cache.allocate(request, num_new)
            assert allocated is not None, "has_room was asked"
            block_ids, others = self.cache.tables(request)
            new_blocks.extend((request.row, *block) for block in others)
            new_rows.append(
                NewRow(
                    row=request.row,
                    num_computed_tokens=request.num_computed_tokens,
                    num_prompt_tokens=request.num_prompt_tokens,
                    block_ids=block_ids,
                    params=request.params,
                    seed=request.seed,
                    stop_token_ids=tuple(request.stop_token_ids),
                    token_ids=list(request.token_ids) if request.needs_history else None,
                    bad_words=request.bad_words,
                    rope_len=0 if request.context is None else request.context.rope_len,
                    adapter=None if request.adapter is None else request.adapter.place,
                )
            )
            scheduled.append((request, num_new))
            budget -= num_new
            self.cache.publish(request, request.num_computed_tokens + num_new)

    def _plan(
        self,
        scheduled: list[tuple[Request, int]],
        new_rows: list[NewRow],
        new_blocks: list[tuple[int, int, int]],
    ) -> SchedulerOutput:
        """Write the message, single-token requests first, and advance the counters."""
        scheduled.sort(key=lambda item: item[1] > 1)  # stable: order of admission within each half
        plan = SchedulerOutput(
            new_rows=new_rows, new_blocks=new_blocks, num_decodes=sum(num_new == 1 for _, num_new in scheduled)
        )
        sampled: list[Request] = []
        step = PlannedStep(sampled, plan)
        for request, num_new in scheduled:
            start = request.num_computed_tokens
            end = start + num_new
            is_sampled = end == request.num_tokens
            plan.rows.append(request.row)
            plan.num_scheduled_tokens.append(num_new)
            plan.num_computed_tokens.append(start)
            plan.num_samples.append(int(is_sampled))
            plan.token_ids.extend(request.token_ids[start:end])
            if end > len(request.token_ids):
                plan.token_ids.append(-1)
            request.num_computed_tokens = end
            if request.scoring is not None or request.capture is not None:
                step.extras.plan(plan, request, start, end)
            if is_sampled:
                request.num_pending_tokens += 1
                sampled.append(request)
            self.stats.num_context_tokens_read += end
            self.stats.num_query_key_pairs += num_new * (start + 1 + end) // 2
        has_forms = any(request.constraint is not None for request in sampled)
        if has_forms:
            plan.grammar_bitmask = masks_of(sampled, self.catch_up)
        self.stats.num_tokens_computed += len(plan.token_ids)
        self.stats.num_tokens_sampled += len(sampled)
        self._planned.append(step)
        if self._shared_prefixes is not None:
            tables = [request.block_ids[0] for request, _ in scheduled[: plan.num_decodes]]
            plan.shared_prefixes = self._shared_prefixes.find(tables, self.cache.pool.num_shared)
        is_steady = len(sampled) == len(self.running) == plan.num_decodes and not (step.extras.captured or has_forms)
        if is_steady and not any(r.needs_host_tokens or (r.context and r.context.recompute_from) for r in sampled):
            self._steady = SteadyDecode(sampled, self.cache.block_size, plan.shared_prefixes)
        return plan

    # -- after a step --

    def update(self, output: ModelRunnerOutput, find_stop_string: FindStopString = no_stop_string) -> list[Request]:
        """Take in the oldest step in flight; returns the requests that got a token or ended, some of them both."""
        step = self._planned[0]
        changed = self._take_in(step, output, find_stop_string)
        self._planned.popleft()  # last: until then an interruption takes everything back
        return changed

    def _take_in(self, step: PlannedStep, output: ModelRunnerOutput, find_stop_string: FindStopString) -> list[Request]:
        if output.logprobs or output.prompt_logprobs or output.hidden_states:
            step.extras.take(step.sampled, output)
        steady = self._steady
        if steady is not None and step.sampled is steady.requests:
            if not output.failures and steady.ends_nobody(output.token_ids):
                for request in steady.take_result(output.token_ids):
                    self.cache.publish(request, request.num_computed_tokens)
                for request in steady.with_stop_strings:
                    self._end_if_due(request, find_stop_string)
                return list(step.sampled)
            self._steady = None
        changed: list[Request] = []
        for index, (request, token_ids) in enumerate(zip(step.sampled, output.token_ids, strict=True)):
            request.num_pending_tokens -= 1
            if request.is_finished:
                continue
            changed.append(request)
            failure = output.failures.get(index) or (request.constraint and request.constraint.error)
            if failure:
                self.finish(request, End("error", error=failure))
                continue
            for token_id in token_ids:
                self._take_token(request, token_id, find_stop_string)
                if request.is_finished:
                    break
        return changed

    def _take_token(self, request: Request, token_id: int, find_stop_string: FindStopString) -> None:
        request.token_ids.append(token_id)
        num_tokens = len(request.token_ids)
        if self._end_if_due(request, find_stop_string):
            return
        if request.context is not None and request.context.is_outgrown_by(num_tokens):
            if request.is_running:
                self._preempt(request)
            become_long(request, request.context)
        elif num_tokens % self.cache.block_size == 1 and request.is_running:
            self.cache.publish(request, request.num_computed_tokens)  # a block has just become full and computed

    def _end_if_due(self, request: Request, find_stop_string: FindStopString) -> bool:
        """Finish the request if its newest token ends it; whether it did."""
        end = find_end(request, find_stop_string)
        if end is not None:
            self.finish(request, end)
        return end is not None

    # -- leaving --

    def _preempt(self, request: Request) -> None:
        """Back to the head of the queue without blocks; its tokens stay, and their KV is computed again later."""
        self.running.remove(request)
        self._release(request)
        request.num_computed_tokens = 0
        self.waiting.appendleft(request)
        self.stats.num_preemptions += 1

    def _release(self, request: Request) -> None:
        self.cache.release(request)
        self._free_rows.append(request.row)
        request.row = -1
