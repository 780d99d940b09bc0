"""Random workloads of models that keep states, and what happened to their snapshots.

    python -m tests.engine.state_workloads --workloads 5000 [--start N]      the long proof: 5 minutes of one core
    test_scheduler_oracle.py                                                 the same for some hundred of them

Owns the counts of what is rare: where histories part, snapshots that go before their blocks and blocks before their
snapshots, aborts between a plan and what it fills. Does not own the oracle, which looks at every token and state.
Invariant: a proof in which one of these did not happen fails.
"""

import argparse
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from nanovllm.engine.cache_manager import BlockTables
from nanovllm.engine.engine import Engine
from nanovllm.engine.request import Request
from nanovllm.engine.snapshot_pool import SnapshotPool
from nanovllm.engine.state_cache import StateCache

EVENTS = (
    "hits",
    "hits where another history parted",
    "snapshots evicted before their blocks",
    "snapshots evicted behind their blocks",
    "aborts with a snapshot on order",
)


@contextmanager
def counted_events() -> Iterator[Counter[str]]:
    """Inside the `with`, what happens to snapshots is counted."""
    events = Counter(dict.fromkeys(EVENTS, 0))
    went_on_with: dict[tuple[int, bytes], set[int]] = {}  # by pool and snapshot: tokens behind it
    reserve, enter, abort = SnapshotPool.reserve, StateCache.enter, Engine.abort

    def counted_reserve(pool: SnapshotPool, num_tokens_saved: int, kept: Collection[int] = ()) -> int | None:
        before = set(pool._by_hash)
        slot = reserve(pool, num_tokens_saved, kept)
        for block_hash in before - set(pool._by_hash):
            events[f"snapshots evicted {'before' if pool._has_blocks(block_hash) else 'behind'} their blocks"] += 1
        return slot

    def counted_enter(cache: StateCache, request: Request, prefix: BlockTables) -> None:
        first = len(prefix[0])
        enter(cache, request, prefix)
        if first:
            snapshot = id(cache.snapshots), cache._hashes(request, first)[first - 1]
            tokens = went_on_with.setdefault(snapshot, set())
            tokens.add(request.token_ids[first * cache.block_size])
            events["hits"] += 1
            events["hits where another history parted"] += len(tokens) > 1

    def counted_abort(engine: Engine, request: Request, *args: Any) -> None:
        running = engine.scheduler.cache._running.get(request)
        events["aborts with a snapshot on order"] += running is not None and bool(running.reserved)
        abort(engine, request, *args)

    with (
        patch.object(SnapshotPool, "reserve", counted_reserve),
        patch.object(StateCache, "enter", counted_enter),
        patch.object(Engine, "abort", counted_abort),
    ):
        yield events


def main() -> None:
    from tests.engine.test_scheduler_oracle import run_random_workload

    parser = argparse.ArgumentParser(description="Random workloads with states against the oracle.")
    parser.add_argument("--workloads", type=int, default=5000)
    parser.add_argument("--start", type=int, default=0, help="the first seed (default: 0)")
    args = parser.parse_args()
    began, totals = time.monotonic(), Counter[str]()
    for drafts in (None, "custom_class", "mtp"):
        with counted_events() as events:
            for seed in range(args.start, args.start + args.workloads):
                preemptions, _, counters = run_random_workload(seed, has_states=True, drafts=drafts)
                totals["preemptions"] += preemptions
                totals["accepted drafts"] += int(counters.get("spec_decode_num_accepted_tokens", 0))
                totals["drafts"] += int(counters.get("spec_decode_num_draft_tokens", 0))
        assert all(events.values()), f"did not happen: {[event for event, count in events.items() if not count]}"
        print(f"drafts by {drafts}: {args.workloads} workloads, {dict(events)}", flush=True)
    print(f"{dict(totals)}; every output and state right, nothing leaked; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
