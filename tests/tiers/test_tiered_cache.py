"""Tiers below the cache against an oracle: a device whose slots remember what they were written for, and a host that
remembers what was copied out of them.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile

from nanovllm.cache_specs import PagedKV
from nanovllm.engine.engine import Engine
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.request import Request
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.scheduler_output import SchedulerOutput
from nanovllm.tiers.host_slots import HostSlots
from nanovllm.tiers.tiered_cache import TieredCache, TieredExecutor
from tests.engine.fake_device import VOCAB_SIZE, Done, FakeDevice, check_nothing_leaked, check_output, make_request, run


@dataclass
class FakeStore:
    """A folder without files. delay: how often it is still looking, for each block that it is asked for."""

    written: dict[bytes, list[bytes | None]] = field(default_factory=dict)
    delay: int = 0
    known: set[bytes] = field(default_factory=set)
    asked: set[bytes] = field(default_factory=set)
    new: set[bytes] = field(default_factory=set)
    num_looks: int = 0

    def find(self, block_hash: bytes) -> bool:
        return block_hash in self.known

    def begin_checks(self, hashes: Iterable[bytes]) -> bool:
        self.new = {one for one in takewhile(lambda one: one in self.written, hashes) if one not in self.known}
        self.num_looks = self.num_looks + 1 if self.new else 0
        return bool(self.new)

    def await_checks(self) -> bool:
        if self.num_looks > self.delay:
            self.known |= self.new
        return self.num_looks > self.delay

    def wants(self, block_hash: bytes) -> bool:
        is_new = block_hash not in self.asked
        self.asked.add(block_hash)
        return is_new

    def use(self, block_hash: bytes) -> None:
        assert block_hash in self.written

    def close(self) -> None:
        pass


class FakeTieredDevice(FakeDevice):
    def __init__(self, *args: object, store: FakeStore) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.host: dict[int, list[bytes | None]] = {}
        self.store = store

    def execute(self, plan: SchedulerOutput) -> Done:
        if plan.moves is not None:
            for block_id, block_hash in plan.moves.keeps:
                self.store.written[block_hash] = self._content(block_id)
            for block_id, slot in plan.moves.saves:
                self.host[slot] = self._content(block_id)
            for block_id, slot in plan.moves.loads:
                self._fill(block_id, self.host[slot])
            for block_id, block_hash in plan.moves.fetches:
                self._fill(block_id, self.store.written[block_hash])
        return super().execute(plan)

    def _content(self, block_id: int) -> list[bytes | None]:
        content = [self.slots.get(block_id * self.block_size + i) for i in range(self.block_size)]
        assert None not in content, "a block that was never filled is kept"
        return content

    def _fill(self, block_id: int, content: list[bytes | None]) -> None:
        for i, history in enumerate(content):
            assert history is not None
            self.slots[block_id * self.block_size + i] = history


def make_tiered(
    rng: random.Random, num_slots: int, store: FakeStore | None, num_blocks: int | None = None
) -> tuple[Engine, FakeTieredDevice, TieredCache]:
    block_size, max_num_seqs = rng.choice([2, 4]), rng.randint(1, 6)
    num_blocks = num_blocks or rng.randint(8, 24)
    cache = TieredCache(num_blocks, block_size, HostSlots(num_slots) if num_slots else None, store)  # type: ignore[arg-type]
    scheduler = Scheduler(cache, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_seqs + rng.randint(0, 24))
    device = FakeTieredDevice(num_blocks, block_size, max_num_seqs, [PagedKV()], 256, store=store or FakeStore())
    engine = Engine(scheduler, TieredExecutor(device, cache), OutputProcessor(None), rng.randint(1, 3))
    return engine, device, cache


def random_requests(rng: random.Random, capacity: int, count: int) -> list[Request]:
    prefixes = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(2, capacity // 2))] for _ in range(4)]
    requests = []
    for number in range(count):
        prompt = rng.choice(prefixes) + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0, 4))]
        requests.append(make_request(prompt, rng.randint(1, 8), name=f"r{number}", limit=capacity))
    return [request for request in requests if request.num_prompt_tokens < request.max_total_tokens]


def test_random_workloads_give_the_tokens_of_a_cache_without_tiers() -> None:
    counts = {"num_blocks_saved": 0, "num_blocks_from_host": 0, "num_blocks_from_store": 0}
    for seed in range(60):
        rng = random.Random(seed)
        store = FakeStore(delay=rng.randint(0, 3)) if seed % 3 else None
        engine, device, cache = make_tiered(rng, 0 if seed % 3 == 1 else rng.randint(1, 40), store)
        requests = random_requests(rng, device.num_blocks * device.block_size, 20)
        for number, request in enumerate(requests):
            engine.add_request(request)
            if rng.random() < 0.5:
                engine.step()
            device.poison(cache.pool)
            if rng.random() < 0.05:
                engine.abort(rng.choice(requests[: number + 1]))
            if rng.random() < 0.03:
                device.num_computed = [0] * len(device.num_computed)
                engine.restart([one for one in requests[: number + 1] if not one.is_finished])
        run(engine)
        for request in requests:
            if request.end is not None and request.end.finish_reason != "abort":
                check_output(request)
        check_nothing_leaked(engine)
        for name, count in cache.counts.items():
            counts[name] += count
    assert all(count > 100 for count in counts.values()), f"something never happened: {counts}"


def test_a_later_engine_finds_what_was_used_twice_and_nothing_else() -> None:
    rng, store = random.Random(1), FakeStore()
    shared, alone = [1, 2, 3, 4] * 4, [5, 6, 7, 8] * 4
    engine, _, _ = make_tiered(rng, 0, store, num_blocks=60)
    for number, prompt in enumerate((shared, alone, shared)):
        engine.add_request(make_request([*prompt, 9], 3, name=f"r{number}"))
        run(engine)
    assert len(store.written) == len(shared) // engine.scheduler.cache.block_size
    later, _, cache = make_tiered(random.Random(1), 0, store, num_blocks=60)
    request = make_request([*shared, 10], 3)
    later.add_request(request)
    run(later)
    check_output(request)
    assert request.num_cached_tokens == len(shared) // cache.block_size * cache.block_size
    assert cache.counts["num_blocks_from_store"] == request.num_cached_tokens // cache.block_size


def test_requests_with_a_salt_or_new_weights_are_not_kept() -> None:
    rng, store = random.Random(1), FakeStore()
    engine, _, cache = make_tiered(rng, 0, store, num_blocks=60)
    for number in range(4):
        request = make_request([1, 2, 3, 4] * 4, 3, name=f"r{number}")
        request.cache_salt = b"tenant" if number < 2 else b""
        if number == 2:
            cache.weights = cache.weights.next()
        engine.add_request(request)
        run(engine)
    assert not store.written
    assert engine.scheduler.stats.num_prompt_tokens_cached > 0


def test_a_slot_that_a_plan_reads_is_not_written_by_it() -> None:
    slots = HostSlots(2)
    first, second = slots.take(b"a"), slots.take(b"b")
    assert {first, second} == {0, 1}
    assert slots.read(b"a") == first and slots.read(b"b") == second
    assert slots.take(b"c") is None, "both are read"
    slots.next_plan()
    assert slots.take(b"c") == first and b"a" not in slots, "the least recently used one goes"
    assert slots.take(b"c") is None, "it is here"
