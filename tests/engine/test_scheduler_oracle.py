"""The scheduler and the prefix cache against an oracle, over random workloads.

Aborts at every point, preemption in pools of a few blocks, chunks of a few tokens, shared prefixes, late stop tokens,
any overlap depth, requests that the host must read before they go on, groups of sequences of one prompt. First come,
first served, reuse of what is cached and the order of preemption hold in all of them, or the output differs.
"""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from nanovllm.cache_specs import CacheGroups, PagedKV
from nanovllm.engine.request import Request
from tests.engine.fake_device import (
    VOCAB_SIZE,
    check_nothing_leaked,
    check_output,
    expected_output,
    make_engine,
    make_request,
)
from tests.engine.state_workloads import counted_events


class Witness:
    """A constraint that allows everything, and insists on seeing each token before the next one is drawn."""

    error = None

    def __init__(self, request: Request) -> None:
        self.request = request
        self.token_ids: list[int] = []

    def advance(self, token_id: int) -> bool:
        self.token_ids.append(token_id)
        return False

    def restart(self, token_ids: Sequence[int]) -> None:
        raise AssertionError("nothing was interrupted")

    def retract(self, num_tokens: int) -> bool:
        del self.token_ids[-num_tokens:]
        return True

    def bitmasks(self, constraints: Sequence["Witness"]) -> np.ndarray:
        """It sees drafts one token at a time, alone, behind what the request has."""
        for witness in constraints:
            output = witness.request.output_token_ids
            assert witness.token_ids[: len(output)] == output
            assert len(witness.token_ids) == len(output) or len(constraints) == 1
        return np.full((len(constraints), 4), -1, dtype=np.int32)


class Guesser:
    """Drafts of any length, right as far as a coin says: the oracle's own continuation, and then something else."""

    def __init__(self, seed: int, specs: Sequence[PagedKV], has_states: bool) -> None:
        self._rng = random.Random(seed)
        self._specs, self._has_states = specs, has_states

    def propose(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        rng, length = self._rng, len(token_ids)
        draft = expected_output(
            token_ids, length + rng.randint(0, num_tokens), frozenset(), self._specs, self._has_states
        )
        if draft and rng.random() < 0.7:
            wrong = rng.randrange(len(draft))
            draft[wrong:] = [rng.randrange(VOCAB_SIZE) for _ in draft[wrong:]]
        return draft


def run_random_workload(
    seed: int, specs: Sequence[PagedKV] = (PagedKV(),), has_states: bool = False, drafts: str | None = None
) -> tuple[int, int, dict[str, float]]:
    """Returns how often it preempted, how many tokens of prompts the cache held, and all counters. specs: of the groups
    of layers; has_states: and other layers keep a state. drafts: by which method requests guess tokens ahead, rightly
    or wrongly.
    """
    rng, how = random.Random(seed), random.Random(seed)
    block_size = rng.choice([2, 4, 8])
    num_blocks = rng.randint(4, 40) * len(specs)
    max_num_seqs = rng.randint(1, 8)
    engine, device = make_engine(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.randint(0, 24),
        enable_prefix_caching=rng.random() < 0.8,
        overlap_depth=rng.randint(1, 3),
        specs=specs,
        num_snapshots=how.choice([0, 1, 2, 4, 8, 30]) if has_states else None,
        stride=how.choice([1, 4, 16]),
        worth_a_step=how.choice([1, 8, 1000]),
        proposer=Guesser(seed, specs, has_states) if drafts == "custom_class" else None,
        drafter=drafts if drafts != "custom_class" else None,
        num_speculative_tokens=how.randint(1, 6),
    )
    groups = CacheGroups(tuple(specs), ((0,),) * len(specs))
    capacity = groups.longest_request(num_blocks, block_size, 320, engine.scheduler.max_num_batched_tokens)
    prefixes = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0, capacity // 2))] for _ in range(3)]
    late = random.Random(seed)  # which forms let their request be planned before its last token is read
    requests, aborted = [], set()
    arrivals = [rng.randint(0, 40) for _ in range(rng.randint(1, 12))]
    for step in range(5_000):
        for _ in range(arrivals.count(step)):
            prompt = (rng.choice(prefixes) + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 12))])[
                : capacity - 1
            ]
            stop_ids = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([0, 0, 5]))]
            max_tokens, needs_host_tokens = rng.randint(1, 30), rng.random() < 0.2
            group = [
                make_request(prompt, max_tokens, stop_ids, f"r{len(requests)}", capacity, needs_host_tokens)
                for _ in range(rng.choice([1, 1, 1, 3]))
            ]
            for request in group:
                request.siblings = group if len(group) > 1 else []
                comes_late = not drafts and late.random() < 0.3
                request.constraint = Witness(request) if needs_host_tokens or comes_late else None
                requests.append(request)
                engine.add_request(request)
        if step > 40 and not engine.has_work():
            break
        if rng.random() < 0.05 and requests:
            victim = rng.choice(requests)
            if not victim.is_finished:
                engine.abort(victim)
                aborted.add(victim)
        engine.step()
        assert drafts or all(r.num_pending_tokens <= 1 for r in requests if r.needs_host_tokens)
        device.poison(engine.scheduler.cache.pool)
        if has_states:
            device.poison_snapshots(engine.scheduler.cache)
        assert len(engine.scheduler.running) <= max_num_seqs
        assert device.num_tokens_per_step[-1:] <= [engine.scheduler.max_num_batched_tokens]
        holders = [r for r in requests if r.block_ids]
        assert len(holders) <= max_num_seqs
        assert all(r.num_published_blocks <= len(table) for r in requests for table in r.block_ids or [[]])
        assert all(r.num_uncomputed_tokens <= 1 for r in engine.scheduler.running[:-1]), "only the newest is cut"
        for request in holders:
            for spec, table in zip(specs, request.block_ids, strict=True):
                num_tokens = request.num_tokens + 21 * bool(drafts)  # which may have been rejected
                most = spec.num_blocks(num_tokens, engine.scheduler.max_num_batched_tokens, block_size)
                assert sum(block_id >= 0 for block_id in table) <= most
    assert not engine.has_work(), "the engine does not come to an end"
    for request in requests:
        assert request.is_finished
        if request not in aborted:
            check_output(request, specs, has_states)
            if isinstance(request.constraint, Witness):
                ends = request.output_token_ids[-1] in request.stop_token_ids
                assert request.constraint.token_ids == request.output_token_ids[: -1 if ends else None]
    check_nothing_leaked(engine)
    stats = engine.scheduler.stats
    return stats.num_preemptions, stats.num_prompt_tokens_cached, stats.counters()


@pytest.mark.parametrize("windows", [(None, 6), (3,), (None, 2, 2), (5, 17), (None, 9, 9, 9)], ids=str)
def test_random_workloads_with_windows_equal_the_oracle(windows: tuple[int | None, ...]) -> None:
    """A block that is given back too early is written by others, or unreadable, before the token that needs it."""
    specs = [PagedKV(window) for window in windows]
    results = [run_random_workload(seed, specs) for seed in range(200)]
    if None in windows:  # else everybody fits
        assert sum(preemptions for preemptions, _, _ in results) > 20, "the workloads must preempt"
    assert sum(cached for _, cached, _ in results) > 100, "the workloads must hit the prefix cache"


@pytest.mark.parametrize("start", range(0, 3000, 300))
def test_random_workloads_equal_the_oracle(start: int) -> None:
    results = [run_random_workload(seed) for seed in range(start, start + 300)]
    assert sum(preemptions for preemptions, _, _ in results) > 100, "the workloads must preempt"
    assert sum(cached for _, cached, _ in results) > 100, "the workloads must hit the prefix cache"


@pytest.mark.parametrize("start", range(0, 300, 150))
def test_random_workloads_with_states_equal_the_oracle(start: int) -> None:
    """Every state that is begun from or read sums up the whole history of its tokens, and nothing else."""
    with counted_events() as events:
        results = [run_random_workload(seed, has_states=True) for seed in range(start, start + 150)]
    assert all(events.values()), events
    assert sum(preemptions for preemptions, _, _ in results) > 50, "the workloads must preempt"
    assert sum(cached for _, cached, _ in results) > 100, "the workloads must hit the prefix cache"


@pytest.mark.parametrize("windows", [(None,), (None, 6)], ids=str)
def test_random_workloads_with_drafts_equal_the_oracle(windows: tuple[int | None, ...]) -> None:
    """A rejected draft leaves wrong keys behind: where they could be found, or read, they would show."""
    specs = [PagedKV(window) for window in windows]
    results = [run_random_workload(seed, specs, drafts="custom_class") for seed in range(80)]
    assert sum(preemptions for preemptions, _, _ in results) > 20, "the workloads must preempt"
    assert sum(cached for _, cached, _ in results) > 100, "the workloads must hit the prefix cache"
    drafted, accepted = (
        sum(counters[f"spec_decode_num_{name}_tokens"] for _, _, counters in results) for name in ("draft", "accepted")
    )
    assert 0.2 * drafted < accepted < 0.8 * drafted, "the workloads must accept, and reject"


@pytest.mark.parametrize(
    ("method", "has_states"), [("draft_model", False), ("eagle3", False), ("custom_class", True), ("mtp", True)]
)
def test_random_workloads_with_states_or_chained_drafts_equal_the_oracle(method: str, has_states: bool) -> None:
    """Steps that draft and verify are planned by upper bounds; what drafts has right keys of all that is known. No
    state is begun from, or read, that sums up a rejected token."""
    results = [run_random_workload(seed, drafts=method, has_states=has_states) for seed in range(80)]
    assert sum(preemptions for preemptions, _, _ in results) > 20, "the workloads must preempt"
    drafted, accepted = (
        sum(counters[f"spec_decode_num_{name}_tokens"] for _, _, counters in results) for name in ("draft", "accepted")
    )
    assert 0.2 * drafted < accepted < 0.8 * drafted, "the workloads must accept, and reject"
