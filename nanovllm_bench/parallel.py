"""`nanovllm bench parallel`: the same workloads on one device and on several, by tensor and by data parallelism.

Owns the layouts and what is compared between them. Invariant: each layout runs the same workloads as the first, which
is one device; its greedy tokens in float32 are compared with that one's.

    collectives    a decode step's all-reduces and its gathering of logits, timed by themselves on the same ranks
    plan message   a decode step's plan from the engine to idle readers, and an answer back: no model
"""

import pickle
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

from nanovllm.cli.options import engine_options
from nanovllm.engine.scheduler_output import SchedulerOutput
from nanovllm.executor.children import Children, start_child
from nanovllm.executor.ring import RingWriter
from nanovllm.roofline.ceilings import measure_ceilings
from nanovllm.roofline.roofline import Ceilings, Work, report
from nanovllm_bench.collectives import time_collectives
from nanovllm_bench.engines import NanoVLLM
from nanovllm_bench.measure import measure_latency, measure_throughput
from nanovllm_bench.report import print_record, print_table
from nanovllm_bench.workload import Workload, named, uniform

_WORKLOADS = ("offline", "prefill", "decode_1", "decode_64")
_NUM_MESSAGES = 2000
_Row = dict[str, Any]
_COLUMNS = {
    "layout": "layout",
    "workload": "workload",
    "output tok/s": "output_tokens_per_second",
    "prompt tok/s": "prompt_tokens_per_second",
    "ms/step": "step_ms",
    "x one device": "speedup",
    "of floor": "share_of_floor",
    "collectives ms": "collectives_ms",
}
_MESSAGE_COLUMNS = {
    "readers": "num_ranks",
    "requests": "num_requests",
    "bytes": "num_bytes",
    "us to send": "send_us",
    "us there and back": "round_trip_us",
}


class Layout(NamedTuple):
    tensor_parallel_size: int
    data_parallel_size: int

    @property
    def name(self) -> str:
        return f"tp{self.tensor_parallel_size} dp{self.data_parallel_size}"


def run(args: Namespace) -> int:
    workloads = _workloads(args)
    results: list[_Row] = []
    tokens: dict[str, list[list[int]]] = {}
    for layout in _layouts(args):
        results += _measure(args, layout, workloads)
        tokens[layout.name] = _greedy_tokens(args, layout)
    _add_speedups(results)
    first = next(iter(tokens.values()))
    equality = {name: own == first for name, own in tokens.items()}
    messages = [
        plan_message_cost(size, num_requests) for size in args.tensor_parallel_sizes for num_requests in (1, 64)
    ]
    print_table([{**row, "share_of_floor": row["roofline"]["share_of_floor"]} for row in results], _COLUMNS)
    print()
    print_table(messages, _MESSAGE_COLUMNS)
    print("\ntokens in float32 are those of one device: " + ", ".join(f"{k} {v}" for k, v in equality.items()))
    settings = {"repeats": args.repeats, **engine_options(args)}
    record = {"settings": settings, "results": results, "same_tokens": equality, "plan_messages": messages}
    print_record(args, record)
    return 0 if all(equality.values()) else 1


def _layouts(args: Namespace) -> Iterator[Layout]:
    """One device first: what the others are compared with."""
    yield Layout(1, 1)
    yield from (Layout(size, 1) for size in args.tensor_parallel_sizes if size > 1)
    yield from (Layout(1, size) for size in args.data_parallel_sizes if size > 1)


def _workloads(args: Namespace) -> list[Workload]:
    if args.batch_sizes is None:
        return [named(name) for name in args.workload or _WORKLOADS]
    counts, input_len = args.batch_sizes, args.input_len
    decode = [uniform(count, input_len, args.output_len) for count in counts]
    return [uniform(max(counts), input_len, 1), *decode]


def _measure(args: Namespace, layout: Layout, workloads: list[Workload]) -> list[_Row]:
    rows = []
    print(layout.name, file=sys.stderr)
    with closing(NanoVLLM(args.model, {**engine_options(args), **layout._asdict()})) as engine:
        size, device, dtype, count = engine.model_size(), engine.device, engine.dtype, engine.num_devices
        for workload in workloads:
            # A step can be timed where all prompts want equally many tokens, and more than one.
            is_decode = len(set(workload.max_tokens)) == 1 and workload.max_tokens[0] > 1
            measure = measure_latency if is_decode else measure_throughput
            row = measure(engine, workload, args.repeats, engine.vocab_size)
            if is_decode and layout.tensor_parallel_size > 1:
                row["collectives_ms"] = max(engine.llm.apply_model(partial(time_collectives, len(workload.prompts))))
            rows.append({"layout": layout.name, **layout._asdict(), **row})
    one = measure_ceilings(device, dtype)
    ceilings = Ceilings(bytes_per_second=one.bytes_per_second * count, flops_per_second=one.flops_per_second * count)
    for row in rows:
        row["ceilings"] = asdict(ceilings)
        row["roofline"] = report(Work(**row["work"]), size, ceilings, sum(row["seconds"]))
    return rows


def _greedy_tokens(args: Namespace, layout: Layout) -> list[list[int]]:
    workload = uniform(8, 24, 24)
    options = {**engine_options(args), **layout._asdict(), "dtype": "float32"}
    with closing(NanoVLLM(args.model, options)) as engine:
        return engine.generate(workload.variant(0, engine.vocab_size))


def _add_speedups(results: list[_Row]) -> None:
    """How many times as fast as on one device: a step, or all of a workload."""
    one = {row["workload"]: row for row in results if row["layout"] == Layout(1, 1).name}
    for row in results:
        base = one[row["workload"]]
        if "step_ms" in row:
            row["speedup"] = base["step_ms"] / row["step_ms"]
        else:
            row["speedup"] = row["total_tokens_per_second"] / base["total_tokens_per_second"]


def plan_message_cost(num_ranks: int, num_requests: int) -> _Row:
    """Of a decode step's plan for so many requests: bytes, and medians of the microseconds to send it, and until rank 0
    has answered with as many tokens. The readers are processes that do nothing else.
    """
    plan = SchedulerOutput(
        new_rows=[],
        new_blocks=[(0, 7, 1234)],
        rows=list(range(num_requests)),
        num_scheduled_tokens=[1] * num_requests,
        num_computed_tokens=[1000] * num_requests,
        num_samples=[1] * num_requests,
        token_ids=[-1] * num_requests,
        num_decodes=num_requests,
    )
    children, ring = Children(), RingWriter(num_ranks)
    for rank in range(num_ranks):
        fds = ring.reader_fds(rank)
        arguments = (rank, num_ranks, *fds)
        children.add(start_child(f"reader {rank}", "nanovllm_bench.plan_reader", arguments, fds))
    ring.release_reader_fds()
    sends, trips, num_bytes = [], [], 0
    for _ in range(_NUM_MESSAGES):
        start = perf_counter()
        message = pickle.dumps(("execute", 1, plan), pickle.HIGHEST_PROTOCOL)
        ring.write(message, children.check)
        sent = perf_counter()
        children.wait()
        children.receive()
        trips.append(1e6 * (perf_counter() - start))
        sends.append(1e6 * (sent - start))
        num_bytes = len(message)
    children.kill()
    ring.close()
    return {
        "num_ranks": num_ranks,
        "num_requests": num_requests,
        "num_bytes": num_bytes,
        "send_us": median(sends),
        "round_trip_us": median(trips),
    }
