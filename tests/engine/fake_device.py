"""A device without a model: each KV slot remembers a hash of the exact history it was written for.

The "model" of these tests computes the next token from the hashes of the whole context as read through the block table.
A slot that is stale, foreign, unwritten or overwritten changes the token, and the output then differs from
`expected_output`, which knows no blocks at all. Where layers have states, each row's and each snapshot's is the hash of
the whole history that it sums up, and changes the token likewise.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import accumulate
from typing import Any

from nanovllm.cache_specs import PagedKV
from nanovllm.engine.block_pool import BlockPool
from nanovllm.engine.cache_manager import CacheManager
from nanovllm.engine.engine import Engine
from nanovllm.engine.grouped_cache import GroupedCache
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.request import Request
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput, TokenLogprobs
from nanovllm.engine.shared_prefixes import SharedPrefixes
from nanovllm.engine.speculation.build import speculative_planner
from nanovllm.engine.speculation.proposer import Proposer
from nanovllm.engine.state_cache import StateCache
from nanovllm.sampling_params import SamplingParams
from nanovllm.speculative_config import SpeculativeConfig, num_unseen

VOCAB_SIZE = 97


def extend_hash(previous: bytes, token_id: int) -> bytes:
    return blake2b(previous + token_id.to_bytes(4, "little"), digest_size=8).digest()


def next_token(history: Sequence[bytes]) -> int:
    return int.from_bytes(blake2b(b"".join(history), digest_size=8).digest(), "little") % VOCAB_SIZE


def seen(spec: PagedKV, num_tokens: int) -> range:
    """The positions that layers of this kind see behind so many tokens."""
    return range(0 if spec.window is None else max(0, num_tokens - spec.window), num_tokens)


def expected_output(
    prompt: Sequence[int],
    max_total_tokens: int,
    stop_token_ids: frozenset[int],
    specs: Sequence[PagedKV] = (PagedKV(),),
    has_states: bool = False,
) -> list[int]:
    """What a request must produce, computed alone and without a cache, by a model with these groups of layers."""
    history: list[bytes] = []
    for token_id in prompt:
        history.append(extend_hash(history[-1] if history else b"", token_id))
    output: list[int] = []
    while len(prompt) + len(output) < max_total_tokens:
        states = [history[-1]] if has_states else []
        output.append(next_token([history[i] for spec in specs for i in seen(spec, len(history))] + states))
        if output[-1] in stop_token_ids:
            break
        history.append(extend_hash(history[-1], output[-1]))
    return output


@dataclass
class Done:
    token_ids: list[list[int]]
    failures: dict[int, str] = field(default_factory=dict)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    prompt_logprobs: list[list[TokenLogprobs]] = field(default_factory=list)
    hidden_states: list[dict[int, Any]] = field(default_factory=list)

    def result(self) -> ModelRunnerOutput:
        return ModelRunnerOutput(
            token_ids=self.token_ids,
            failures=self.failures,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            hidden_states=self.hidden_states,
        )


class FakeDevice:
    """Runs plans in order, at once; keeps its state by row and its KV by slot, as a real worker does.

    specs: of the groups of its layers, with windows of 2 at least; their block tables, each of table_width, lie side by
    side in a row. The hidden state of a token is its position; the log-probability of a prompt token has its position
    for its id. has_states: other layers keep a state; the table of a row's snapshots lies behind the block tables.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        specs: Sequence[PagedKV],
        table_width: int,
        has_states: bool = False,
    ) -> None:
        self.has_states = has_states
        self.states: dict[int, bytes] = {}  # by slot; a row has that of its number
        self._behind: dict[int, list[bytes]] = {}  # by row, the states behind each of the step's tokens
        self.specs = specs
        self.table_width = table_width
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.slots: dict[int, bytes] = {}
        self.tables: list[dict[int, int]] = [{} for _ in range(max_num_seqs)]
        self.num_computed = [0] * max_num_seqs
        self.last_token = [-1] * max_num_seqs
        self.num_tokens_per_step: list[int] = []
        self.plans: list[SchedulerOutput] = []
        self.drafter: FakeDrafter | None = None

    def execute(self, plan: SchedulerOutput) -> Done:
        self.plans.append(plan)
        if plan.num_draft_steps:
            assert self.drafter is not None
            for row, index, block_id in plan.new_blocks:
                self.tables[row][index] = block_id
            self.num_tokens_per_step.append(len(plan.token_ids))
            return Done(self.drafter.execute(plan))
        for new in plan.new_rows:
            self.num_computed[new.row] = new.num_computed_tokens
            self.tables[new.row] = dict(enumerate(new.block_ids))
            self.last_token[new.row] = -1
        for row, index, block_id in plan.new_blocks:
            self.tables[row][index] = block_id
        for new in plan.new_rows if self.has_states else ():
            start = new.num_computed_tokens
            assert start % self.block_size == 0
            self.states[new.row] = self.states[self.tables[new.row][self._snapshot(start - 1)]] if start else b""
        self._write(plan)
        assert set(plan.grammar_bitmask) <= set(plan.rows)  # it may be only now that the engine makes them
        shared = self._shared_blocks(plan)
        sampled = []
        ends = list(accumulate(plan.num_scheduled_tokens))
        for row, count, num_samples, end in zip(
            plan.rows, plan.num_scheduled_tokens, plan.num_samples, ends, strict=True
        ):
            self.num_computed[row] += count
            if num_samples:
                table = {**self.tables[row], **shared.get(row, {})}
                draft = plan.token_ids[end - num_samples + 1 : end]
                sampled.append(self.sample(row, table, draft))
            else:
                self._keep_states(row, count)
        self.num_tokens_per_step.append(len(plan.token_ids))
        return Done(
            sampled,
            prompt_logprobs=[
                [[(position + 1, -1.0, 1)] for position in range(first, first + count)]
                for _, first, count in plan.prompt_logprobs
            ],
            hidden_states=[
                {layer: list(range(start, start + count)) for layer in plan.capture_layers[row]}
                for row, start, count in zip(
                    plan.rows, plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True
                )
                if row in plan.capture_layers
            ],
        )

    def sample(self, row: int, table: dict[int, int], draft: list[int]) -> list[int]:
        """The row's next tokens, as far as each was right about the next; what is computed is cut to these."""
        computed = self.num_computed[row] - len(draft)
        sampled: list[int] = []
        while len(sampled) <= len(draft) and sampled == draft[: len(sampled)]:
            context = [
                self.slots[self.slot(table, position, group)]
                for group, spec in enumerate(self.specs)
                for position in seen(spec, computed + len(sampled))
            ]
            if self.has_states:
                context.append(self._behind[row][len(sampled) - len(draft) - 1])
            sampled.append(next_token(context))
        self.last_token[row], self.num_computed[row] = sampled[-1], computed + len(sampled) - 1
        self._keep_states(row, len(self._behind.get(row, [])) - len(draft) + len(sampled) - 1)
        return sampled

    def _keep_states(self, row: int, num_counting: int) -> None:
        """Of the step's tokens so many count; what would be kept of the others says so."""
        states = self._behind.pop(row, [])
        if not states:
            return
        first = self.num_computed[row] - num_counting
        self.states[row] = states[num_counting - 1]
        for index, state in enumerate(states):
            snapshot = self.tables[row].get(self._snapshot(first + index))
            if (first + index + 1) % self.block_size == 0 and snapshot is not None:
                self.states[snapshot] = state if index < num_counting else b"rejected"

    def _shared_blocks(self, plan: SchedulerOutput) -> dict[int, dict[int, int]]:
        """What rows read through the block table of the first that shares it, as the cascade's kernel does."""
        shared: dict[int, dict[int, int]] = {}
        for first, num_reqs, begin, end in plan.shared_prefixes:
            assert first >= 0 and num_reqs > 1 and first + num_reqs <= plan.num_decodes and begin < end
            blocks = range(begin // self.block_size, end // self.block_size)
            found = {index: self.tables[plan.rows[first]][index] for index in blocks}
            for row in plan.rows[first : first + num_reqs]:
                assert len(shared.setdefault(row, {})) * self.block_size == begin, "prefixes follow each other"
                shared[row].update(found)
        return shared

    def _write(self, plan: SchedulerOutput) -> None:
        """Lowest positions first, over the whole batch: a layer stores all keys before any is read."""
        tokens = iter(plan.token_ids)
        writes = []
        for row, count, start in zip(plan.rows, plan.num_scheduled_tokens, plan.num_computed_tokens, strict=True):
            assert start == self.num_computed[row], "host and device disagree on what has been computed"
            for position in range(start, start + count):
                token_id = next(tokens)
                writes.append((position, row, self.last_token[row] if token_id < 0 else token_id))
        for position, row, token_id in sorted(writes):
            self._store(row, position, token_id)

    def write(self, row: int, token_ids: Sequence[int]) -> None:
        """The row's next tokens."""
        for position, token_id in enumerate(token_ids, self.num_computed[row]):
            self._store(row, position, token_id)

    def _store(self, row: int, position: int, token_id: int) -> None:
        table = self.tables[row]
        for group in range(len(self.specs)):
            previous = self.slots[self.slot(table, position - 1, group)] if position else b""
            self.slots[self.slot(table, position, group)] = extend_hash(previous, token_id)
        if self.has_states:
            behind = self._behind.setdefault(row, [])
            behind.append(extend_hash(behind[-1] if behind else self.states[row], token_id))

    def _snapshot(self, position: int) -> int:
        return len(self.specs) * self.table_width + position // self.block_size

    def slot(self, table: dict[int, int], position: int, group: int) -> int:
        place = group * self.table_width + position // self.block_size
        return table[place] * self.block_size + position % self.block_size

    def poison(self, pool: BlockPool) -> None:
        """Make what nobody may read unreadable: blocks that are free and not in the prefix cache."""
        for block_id in pool._free:
            if pool._hashes[block_id] is None:
                for offset in range(self.block_size):
                    self.slots.pop(block_id * self.block_size + offset, None)

    def poison_snapshots(self, cache: StateCache) -> None:
        for slot in cache.snapshots._free:
            self.states.pop(slot, None)

    def apply(self, function: Callable[[Any], Any]) -> list[Any]:
        return []

    def close(self) -> None:
        pass


class FakeDrafter:
    """A model that drafts on the device: right as far as a coin says.

    Of its keys it remembers, by slot, the hash of the history up to the token that was read there; and, of a head that
    reads tokens ahead, whether the target's states were there then. It insists on right ones for every token that is
    known whenever it drafts.
    """

    def __init__(self, device: FakeDevice, reads_ahead: int, num_unseen: int, seed: int) -> None:
        self._device, self._reads_ahead, self._num_unseen = device, reads_ahead, num_unseen
        self._slots: dict[int, tuple[bytes, bool]] = {}
        self._drawn: dict[int, list[int]] = {}  # by row, what its last chained step drew
        self._rng = random.Random(seed)
        self.num_chained = self.num_begun_unread = 0  # chained steps; those that began before the host knew where

    def execute(self, plan: SchedulerOutput) -> list[list[int]]:
        return self._chained(plan) if plan.num_draft_tokens else self._drafted(plan)

    def _drafted(self, plan: SchedulerOutput) -> list[list[int]]:
        drafts, tokens = [], iter(plan.token_ids)
        columns = plan.rows, plan.num_computed_tokens, plan.num_scheduled_tokens, plan.num_samples
        for row, start, count, is_last in zip(*columns, strict=True):
            first = start + self._reads_ahead
            token_ids = [next(tokens) for _ in range(count)]
            self._read(row, first, token_ids)
            if is_last:
                self._device.last_token[row] = token_ids[-1]
                drafts.append(self._draft(row, plan.num_draft_steps, plan.num_draft_steps))
        return drafts

    def _chained(self, plan: SchedulerOutput) -> list[list[int]]:
        device, sampled = self._device, []
        self.num_chained += 1
        for row, most, count in zip(plan.rows, plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True):
            assert device.num_computed[row] <= most, "the host's counters are upper bounds"
            self.num_begun_unread += device.num_computed[row] < most
            unseen = plan.unseen_tokens.get(row) or self._drawn[row][-self._num_unseen :]
            assert len(unseen) <= self._num_unseen and device.last_token[row] in (-1, unseen[-1])
            device.last_token[row] = unseen[-1]
            self._read(row, device.num_computed[row] - len(unseen) + 1, unseen)
            draft = self._draft(row, plan.num_draft_steps, count - 1)[: count - 1]
            device.write(row, [device.last_token[row], *draft])
            device.num_computed[row] += count
            self._drawn[row] = device.sample(row, device.tables[row], draft)
            sampled.append(self._drawn[row])
        return sampled

    def _read(self, row: int, first: int, token_ids: Sequence[int]) -> None:
        """Tokens of the history from index `first` on."""
        for index, token_id in enumerate(token_ids, first):
            history = extend_hash(self._history(row, index - 1), token_id)
            self._slots[self._slot(row, index - self._reads_ahead)] = history, True

    def _history(self, row: int, index: int) -> bytes:
        device = self._device
        return device.slots[device.slot(device.tables[row], index, 0)] if index >= 0 else b""

    def _slot(self, row: int, position: int) -> int:
        return self._device.slot(self._device.tables[row], position, 0)

    def _draft(self, row: int, num_tokens: int, num_with_blocks: int) -> list[int]:
        device, num_computed = self._device, self._device.num_computed[row]
        history = [self._history(row, index) for index in range(num_computed)]
        history.append(extend_hash(history[-1], device.last_token[row]))
        for index in range(self._reads_ahead, num_computed + 1):
            if index % device.block_size or not self._reads_ahead:
                assert self._slots[self._slot(row, index - self._reads_ahead)] == (history[index], True)
        draft: list[int] = []
        for ahead in range(1, num_tokens + 1):
            is_right = self._rng.random() < 0.7
            states = [history[-1]] if device.has_states else []
            draft.append(next_token(history + states) if is_right else self._rng.randrange(VOCAB_SIZE))
            history.append(extend_hash(history[-1], draft[-1]))
            if ahead < num_tokens and ahead <= num_with_blocks:
                slot = self._slot(row, num_computed + ahead - self._reads_ahead)
                self._slots[slot] = history[-1], not self._reads_ahead
        return draft


def make_engine(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 32,
    enable_prefix_caching: bool = True,
    enable_chunked_prefill: bool = True,
    overlap_depth: int = 1,
    specs: Sequence[PagedKV] = (PagedKV(),),
    max_model_len: int = 1024,
    num_snapshots: int | None = None,
    stride: int = 4,
    worth_a_step: int = 8,
    unit: int = 1,
    proposer: Proposer | None = None,
    drafter: str | None = None,
    num_speculative_tokens: int = 4,
    clock: Callable[[], float] | None = None,
) -> tuple[Engine, FakeDevice]:
    """num_snapshots: of a model some of whose layers keep a state; None: there are no such layers. drafter: the method
    of a model that drafts on the device, in chained steps where it can.
    """
    is_grouped, has_states = list(specs) != [PagedKV()], num_snapshots is not None
    cache = CacheManager(num_blocks, block_size, enable_prefix_caching)
    options = {"max_model_len": max_model_len, "max_step_tokens": max_num_batched_tokens}
    if is_grouped:
        cache = GroupedCache(num_blocks, block_size, enable_prefix_caching, specs, **options)
    elif num_snapshots is not None:
        slots = range(max_num_seqs, max_num_seqs + num_snapshots)
        options |= {"stride": stride, "worth_a_step": worth_a_step, "unit": unit}
        cache = StateCache(num_blocks, block_size, enable_prefix_caching, slots=slots, **options)
    shared_prefixes = SharedPrefixes(2 * block_size, block_size, min_tokens_saved=1)
    make_scheduler: Callable[..., Scheduler] = Scheduler
    if proposer is not None:
        fields = {"method": "custom_class", "proposer": proposer, "adaptive": clock is not None}
        config = SpeculativeConfig(num_speculative_tokens=num_speculative_tokens, **fields)
        planner, parts = speculative_planner(config, VOCAB_SIZE, clock)
        make_scheduler = partial(planner, **parts)
    elif drafter is not None:
        adaptive, num = clock is not None, num_speculative_tokens
        model = None if drafter == "mtp" else "m"
        config = SpeculativeConfig(method=drafter, model=model, num_speculative_tokens=num, adaptive=adaptive)
        planner, parts = speculative_planner(config, VOCAB_SIZE, clock, is_captured=True)
        make_scheduler = partial(planner, **parts)
    scheduler = make_scheduler(
        cache,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_chunked_prefill=enable_chunked_prefill,
        shared_prefixes=None if is_grouped or has_states else shared_prefixes,
    )
    if isinstance(cache, StateCache):
        cache.waiting = lambda: scheduler.waiting
    width = -(-max_model_len // block_size)
    device = FakeDevice(num_blocks, block_size, max_num_seqs, specs, width, has_states)
    if drafter is not None:
        device.drafter = FakeDrafter(device, int(drafter != "draft_model"), num_unseen(config), num_blocks)
    engine = Engine(scheduler, device, OutputProcessor(None), overlap_depth)
    scheduler.catch_up = engine.catch_up
    return engine, device


def make_request(
    prompt: Sequence[int],
    max_tokens: int = 8,
    stop_token_ids: Sequence[int] = (),
    name: str = "r",
    limit: int = 10**6,
    needs_host_tokens: bool = False,
) -> Request:
    return Request(
        request_id=name,
        prompt=None,
        token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        params=SamplingParams(max_tokens=max_tokens, stop_token_ids=list(stop_token_ids)),
        seed=0,
        stop_token_ids=frozenset(stop_token_ids),
        max_total_tokens=min(limit, len(prompt) + max_tokens),
        needs_host_tokens=needs_host_tokens,
    )


def steps(engine: Engine, limit: int = 10_000) -> Iterator[list[Request]]:
    """Step by step until nothing is left to do, what each step changed."""
    for _ in range(limit):
        if not engine.has_work():
            return
        yield engine.step()
    raise AssertionError("the engine does not come to an end")


def run(engine: Engine) -> None:
    for _ in steps(engine):
        pass


def check_output(request: Request, specs: Sequence[PagedKV] = (PagedKV(),), has_states: bool = False) -> None:
    prompt = request.token_ids[: request.num_prompt_tokens]
    expected = expected_output(prompt, request.max_total_tokens, request.stop_token_ids, specs, has_states)
    assert request.output_token_ids == expected


def check_nothing_leaked(engine: Engine) -> None:
    scheduler = engine.scheduler
    assert not scheduler.running and not scheduler.waiting and not scheduler._planned
    assert scheduler.cache.pool.num_free_blocks == scheduler.cache.pool.num_blocks
    assert not any(scheduler.cache.pool._references)
    assert not scheduler.cache.pool.num_shared
    if isinstance(scheduler.cache, StateCache):
        snapshots = scheduler.cache.snapshots
        found = [snapshot.slot for snapshot in snapshots._by_hash.values()]
        assert sorted(found + snapshots._free) == list(snapshots.slots), "a slot is reserved still, or is there twice"
