"""Scheduler: what runs in the next step, and what a finished step means for each request.

Owns the waiting and running queues, rows, blocks and the requests' counters; no tensor, no text. There are no phases: a
request has tokens and computed tokens, and a step computes some of the difference. Prefill, decode, chunked prefill and
the return of a preempted request are that one rule.

Invariants: the counters move when a step is planned, so the next step can be planned before this one has run; steps run
in the order they were planned, so blocks freed now may be handed out now; a preempted request comes back only when the
host has read every token of it.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanovllm.engine.block_pool import BlockPool, hash_block
from nanovllm.engine.ends import FindStopString, find_end, no_stop_string
from nanovllm.engine.request import LONG_SALT, Request, RequestStatus
from nanovllm.engine.scheduler_output import ModelRunnerOutput, NewRow, SchedulerOutput
from nanovllm.engine.shared_prefixes import SharedPrefixes
from nanovllm.engine.steady_decode import SteadyDecode


@dataclass(slots=True)
class SchedulerStats:
    """Counted when a step is planned. Of what a step reads and multiplies, these depend on the requests."""

    num_preemptions: int = 0
    num_prompt_tokens_cached: int = 0
    num_tokens_computed: int = 0
    num_tokens_sampled: int = 0
    num_context_tokens_read: int = 0  # each request's context, its new tokens included, once a step
    num_query_key_pairs: int = 0  # each new token with its whole context


@dataclass(slots=True)
class PlannedStep:
    """What is remembered of a step in flight, until its results come."""

    sampled: list[Request]  # for which it samples
    scored: list[Request] = field(default_factory=list)  # whose prompts it scores, as in the plan's prompt_logprobs
    captured: list[tuple[Request, int]] = field(default_factory=list)  # whose hidden states it brings, from where on


class Scheduler:
    """First come, first served, under a token budget per step (`max_num_batched_tokens`) and a row limit.

    max_num_batched_tokens must be at least max_num_seqs: every running request then gets a token in every step; and
    without chunked prefill as much as any request can have: it then gets its turn once few enough others run.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool,
        enable_chunked_prefill: bool = True,
        shared_prefixes: SharedPrefixes | None = None,
    ) -> None:
        """shared_prefixes: where the device reads at once what decodes share."""
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_prefix_caching = enable_prefix_caching
        self.enable_chunked_prefill = enable_chunked_prefill
        self.pool = BlockPool(num_blocks)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission; the last one is the newest
        self.stats = SchedulerStats()
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._planned: deque[PlannedStep] = deque()  # the steps in flight, oldest first
        self._steady: SteadyDecode | None = None
        self._shared_prefixes = shared_prefixes

    # -- what enters and leaves --

    def add_request(self, request: Request) -> None:
        self.waiting.append(request)

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """End a request at any point. What a step in flight still samples for it is dropped when it arrives."""
        if request.is_finished:
            return
        if request.status is RequestStatus.RUNNING:
            self._steady = None
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason

    def restart(self, requests: Iterable[Request]) -> None:
        """Forget all plans and blocks; `requests`, the unfinished ones in order, wait again and compute their KV anew.

        For a step that was interrupted anywhere: lists may be half changed, and blocks published that were never
        written.
        """
        self.pool = BlockPool(self.pool.num_blocks)
        self.running.clear()
        self.waiting.clear()
        self._planned.clear()
        self._steady = None
        self._free_rows = list(range(self.max_num_seqs - 1, -1, -1))
        for request in requests:
            request.status = RequestStatus.WAITING
            request.num_computed_tokens = request.num_pending_tokens = request.num_published_blocks = 0
            request.num_scored_tokens = len(request.prompt_logprobs)
            request.row, request.block_ids = -1, []
            if request.constraint is not None:
                request.constraint.restart(request.output_token_ids)
            self.waiting.append(request)

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
            self._schedule_waiting(budget, scheduled, new_rows)
        return self._plan(scheduled, new_rows, new_blocks) if scheduled else None

    def _schedule_steady(self, steady: SteadyDecode) -> SchedulerOutput | None:
        """One more token for each running request; None where that needs the general rule."""
        out_of_blocks = steady.out_of_blocks()
        if (
            (self.waiting and self._free_rows)
            or not steady.num_steps_left
            or len(out_of_blocks) > self.pool.num_free_blocks
        ):
            return None
        new_blocks: list[tuple[int, int, int]] = []
        for request in out_of_blocks:
            new_blocks.extend((request.row, len(request.block_ids) - 1, i) for i in self._allocate(request, 1) or ())
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
        self._planned.append(PlannedStep(steady.requests))
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
            while (block_ids := self._allocate(request, num_new)) is None:
                newest = self.running[-1]
                self._preempt(newest)
                if newest is request:
                    return budget
            if num_new > 1:
                self._publish(request, request.num_computed_tokens + num_new)  # for those that enter in this step
            first = len(request.block_ids) - len(block_ids)
            new_blocks.extend((request.row, first + i, block_id) for i, block_id in enumerate(block_ids))
            scheduled.append((request, num_new))
            budget -= num_new
            index += 1
        return budget

    def _schedule_waiting(self, budget: int, scheduled: list[tuple[Request, int]], new_rows: list[NewRow]) -> None:
        """Admit waiting requests in order while a row, budget and blocks for all their known tokens are free."""
        while self.waiting and self._free_rows and budget > 0:
            request = self.waiting[0]
            if request.num_pending_tokens:
                return  # preempted with a token on the way: it cannot be recomputed before it is read
            cached = self._find_cached_blocks(request)
            num_needed = self._num_blocks(request.num_tokens) - len(cached)
            if num_needed > self.pool.num_free_blocks - self.pool.num_free_among(cached):
                return
            if not self.enable_chunked_prefill and request.num_tokens - len(cached) * self.block_size > budget:
                return
            self.waiting.popleft()
            self.pool.acquire(cached)
            request.block_ids = cached
            request.num_published_blocks = len(cached)
            request.num_computed_tokens = len(cached) * self.block_size
            if request.num_cached_tokens is None:
                request.num_cached_tokens = request.num_computed_tokens
                self.stats.num_prompt_tokens_cached += request.num_computed_tokens
            request.status = RequestStatus.RUNNING
            request.row = self._free_rows.pop()
            self.running.append(request)
            num_uncomputed = request.num_tokens - request.num_computed_tokens
            allocated = self._allocate(request, num_uncomputed)
            assert allocated is not None, "the blocks were counted above"
            num_new = min(num_uncomputed, budget)
            new_rows.append(
                NewRow(
                    row=request.row,
                    num_computed_tokens=request.num_computed_tokens,
                    num_prompt_tokens=request.num_prompt_tokens,
                    block_ids=list(request.block_ids),
                    params=request.params,
                    seed=request.seed,
                    stop_token_ids=tuple(request.stop_token_ids),
                    token_ids=list(request.token_ids) if request.needs_history else None,
                    bad_words=request.bad_words,
                    rope_len=request.rope_len,
                )
            )
            scheduled.append((request, num_new))
            budget -= num_new
            self._publish(request, request.num_computed_tokens + num_new)

    def _plan(
        self,
        scheduled: list[tuple[Request, int]],
        new_rows: list[NewRow],
        new_blocks: list[tuple[int, int, int]],
    ) -> SchedulerOutput:
        """Write the message, single-token requests first, and advance the counters."""
        scheduled.sort(key=lambda item: item[1] > 1)  # stable: order of admission within each half
        plan = SchedulerOutput(
            new_rows=new_rows,
            new_blocks=new_blocks,
            rows=[],
            num_scheduled_tokens=[],
            num_computed_tokens=[],
            num_samples=[],
            token_ids=[],
            num_decodes=sum(num_new == 1 for _, num_new in scheduled),
        )
        sampled: list[Request] = []
        step = PlannedStep(sampled)
        for request, num_new in scheduled:
            start = request.num_computed_tokens
            if request.params.capture is not None:
                step.captured.append((request, start))
                plan.capture_layers[request.row] = request.params.capture["layers"]
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
            if request.num_unscored_tokens and end > request.num_scored_tokens:
                self._score(plan, request, end)
                step.scored.append(request)
            if is_sampled:
                request.num_pending_tokens += 1
                sampled.append(request)
            self.stats.num_context_tokens_read += end
            self.stats.num_query_key_pairs += num_new * (start + 1 + end) // 2
        constrained = {request.row: request.constraint for request in sampled if request.constraint is not None}
        if constrained:
            constraints = list(constrained.values())
            plan.grammar_bitmask = dict(zip(constrained, constraints[0].bitmasks(constraints), strict=True))
        self.stats.num_tokens_computed += len(plan.token_ids)
        self.stats.num_tokens_sampled += len(sampled)
        self._planned.append(step)
        if self._shared_prefixes is not None:
            tables = [request.block_ids for request, _ in scheduled[: plan.num_decodes]]
            plan.shared_prefixes = self._shared_prefixes.find(tables, self.pool.num_shared)
        is_steady = len(sampled) == len(self.running) == plan.num_decodes and not step.captured
        if is_steady and not any(r.needs_host_tokens or r.recompute_from is not None for r in sampled):
            self._steady = SteadyDecode(sampled, self.block_size, plan.shared_prefixes)
        return plan

    @staticmethod
    def _score(plan: SchedulerOutput, request: Request, end: int) -> None:
        """Ask for the log-probabilities of the prompt tokens up to the one at `end` that are not known yet.

        The plan's last row is the request's. What is known or in flight is not asked again after a preemption.
        """
        first, end = request.num_scored_tokens, min(end, request.num_prompt_tokens - 1)
        plan.prompt_logprobs.append((len(plan.rows) - 1, first, end - first))
        request.num_scored_tokens = end

    # -- after a step --

    def update(self, output: ModelRunnerOutput, find_stop_string: FindStopString = no_stop_string) -> list[Request]:
        """Take in the oldest step in flight; returns the requests that got a token or ended, some of them both."""
        step = self._planned.popleft()
        self._take_logprobs(step, output)
        for (request, start), states in zip(step.captured, output.hidden_states, strict=True):
            self._take_hidden_states(request, start, states)
        steady = self._steady
        if steady is not None and step.sampled is steady.requests:
            if not output.failures and steady.ends_nobody(output.token_ids):
                for request in steady.take_result(output.token_ids):
                    self._publish(request, request.num_computed_tokens)
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
                request.error = failure
                self.finish(request, "error")
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
        if request.recompute_from is not None and num_tokens > request.recompute_from:
            self._recompute(request)
        elif num_tokens % self.block_size == 1 and request.status is RequestStatus.RUNNING:
            self._publish(request, request.num_computed_tokens)  # a block has just become full and computed

    def _end_if_due(self, request: Request, find_stop_string: FindStopString) -> bool:
        """Finish the request if its newest token ends it; whether it did."""
        end = find_end(request, find_stop_string)
        if end is None:
            return False
        request.error = end.error
        self.finish(request, end.finish_reason, end.stop_reason)
        return True

    @staticmethod
    def _take_logprobs(step: PlannedStep, output: ModelRunnerOutput) -> None:
        for request, entries in zip(step.scored, output.prompt_logprobs, strict=True):
            request.prompt_logprobs.extend(entries)
        if output.logprobs:
            for request, entry in zip(step.sampled, output.logprobs, strict=True):
                if entry is not None and not request.is_finished:
                    request.logprobs.append(entry)

    @staticmethod
    def _take_hidden_states(request: Request, start: int, states: dict[int, Any]) -> None:
        """states: layer -> tokens from `start` on. What a preempted request computes again is known already."""
        num_known = request.num_captured_tokens - start
        new = {layer: tokens[num_known:] for layer, tokens in states.items()}
        num_new = len(next(iter(new.values())))
        if num_new and not request.is_finished:
            request.hidden_states.append(new)
            request.num_captured_tokens += num_new

    # -- blocks --

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _allocate(self, request: Request, num_new_tokens: int) -> list[int] | None:
        """Extend the request's blocks to hold that many more computed tokens; the blocks added, or None if too few."""
        needed = self._num_blocks(request.num_computed_tokens + num_new_tokens) - len(request.block_ids)
        if needed <= 0:
            return []
        block_ids = self.pool.allocate(needed)
        if block_ids is not None:
            request.block_ids.extend(block_ids)
        return block_ids

    def _preempt(self, request: Request) -> None:
        """Back to the head of the queue without blocks; its tokens stay, and their KV is computed again later."""
        self.running.remove(request)
        self._release(request)
        request.num_computed_tokens = 0
        request.status = RequestStatus.WAITING
        self.waiting.appendleft(request)
        self.stats.num_preemptions += 1

    def _recompute(self, request: Request) -> None:
        """Its context has become a long one, in which the keys of all positions are others (see `layers/rotary.py`)."""
        if request.status is RequestStatus.RUNNING:
            self._preempt(request)
        request.recompute_from = None
        request.rope_len = len(request.token_ids)
        request.cache_salt, request.block_hashes = LONG_SALT, []

    def _release(self, request: Request) -> None:
        self._publish(request, request.num_computed_tokens)
        self.pool.release(request.block_ids)
        request.block_ids = []
        request.num_published_blocks = 0
        self._free_rows.append(request.row)
        request.row = -1

    # -- prefix cache --

    def _find_cached_blocks(self, request: Request) -> list[int]:
        """Cached blocks of the request's prefix; at least one token is left over to compute, for its logits.

        And all tokens from which the log-probability of a prompt token is still to be computed. Without a prefix cache
        these are blocks of its prompt that a sibling holds.
        """
        if request.params.capture is not None:
            return []  # the cache holds keys and values, no hidden states
        num_tokens = request.num_scored_tokens if request.num_unscored_tokens else len(request.token_ids) - 1
        last = num_tokens // self.block_size
        if self.enable_prefix_caching:
            return self.pool.find_prefix(self._hashes(request, last)[:last])
        last = min(last, request.num_prompt_tokens // self.block_size)
        alike = (sibling for sibling in request.siblings if sibling.cache_salt == request.cache_salt)
        held = [sibling.block_ids[: min(last, sibling.num_published_blocks)] for sibling in alike]
        return max(held, key=lambda block_ids: len(block_ids), default=[])

    def _publish(self, request: Request, num_computed_tokens: int) -> None:
        """Let others find the request's full blocks: anyone through the prefix cache, its siblings without one.

        A block may be found as soon as the step that fills it is planned: every layer stores the whole batch's keys and
        values before anyone in the batch reads them, and later steps run later.
        """
        num_full = min(num_computed_tokens, len(request.token_ids)) // self.block_size
        num_published = request.num_published_blocks
        if num_full <= num_published:
            return
        request.num_published_blocks = num_full
        if self.enable_prefix_caching:
            hashes = self._hashes(request, num_full)
            for index in range(num_published, num_full):
                self.pool.publish(request.block_ids[index], hashes[index])

    def _hashes(self, request: Request, num_blocks: int) -> Sequence[bytes]:
        """The request's first num_blocks (or more) block hashes; each block is hashed once in the request's life."""
        hashes = request.block_hashes
        if not hashes and request.siblings:
            num_prompt = request.num_prompt_tokens // self.block_size
            alike = (sibling for sibling in request.siblings if sibling.cache_salt == request.cache_salt)
            longest = max(alike, key=lambda sibling: len(sibling.block_hashes))
            hashes.extend(longest.block_hashes[:num_prompt])
        while len(hashes) < num_blocks:
            start = len(hashes) * self.block_size
            parent = hashes[-1] if hashes else request.cache_salt
            hashes.append(hash_block(parent, request.token_ids[start : start + self.block_size]))
        return hashes
