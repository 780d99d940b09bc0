"""`nanovllm bench throughput` and `nanovllm bench latency`.

Owns what is timed and how often. Invariant: every engine runs the same workloads, one engine after the other in one
process, each with one warm-up run that is not counted; figures are medians, and the spread of the runs stands beside
them.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import closing
from importlib.util import find_spec
from statistics import median
from time import perf_counter
from typing import Any

from nanovllm.bench.engines import VLLM, BenchEngine, HuggingFace, NanoVLLM
from nanovllm.bench.report import print_json, print_table
from nanovllm.bench.workload import Workload, named, uniform
from nanovllm.cli.options import engine_options

_INPUT_LEN, _OUTPUT_LEN = 64, 128

_Row = dict[str, Any]
_THROUGHPUT_COLUMNS = {
    "engine": "engine",
    "workload": "workload",
    "output tok/s": "output_tokens_per_second",
    "slowest": "slowest",
    "fastest": "fastest",
    "total tok/s": "total_tokens_per_second",
    "nanovllm is x faster": "nanovllm_speedup",
}
_LATENCY_COLUMNS = {
    "engine": "engine",
    "workload": "workload",
    "first token ms": "first_token_ms",
    "ms/step": "step_ms",
    "slowest": "slowest",
    "fastest": "fastest",
    "output tok/s": "output_tokens_per_second",
    "nanovllm is x faster": "nanovllm_speedup",
}


def run(args: Namespace) -> int:
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
    workloads = _workloads(args)
    if "vllm" in args.compare and find_spec("vllm") is None:
        raise ImportError("--compare vllm needs vLLM in this environment: pip install vllm")
    is_throughput = args.kind == "throughput"
    ours = NanoVLLM(args.model, engine_options(args))
    settings = {"dtype": ours.dtype, "device": ours.device, "repeats": args.repeats, **engine_options(args)}
    vocab_size = ours.vocab_size
    rows: list[_Row] = []
    for engine in _engines(args, ours):
        with closing(engine):
            measure = _throughput if is_throughput else _latency
            rows += [measure(engine, workload, args.repeats, vocab_size) for workload in workloads]
    rows.sort(key=lambda row: [workload.name for workload in workloads].index(row["workload"]))
    _add_speedups(rows)
    print_table(rows, _THROUGHPUT_COLUMNS if is_throughput else _LATENCY_COLUMNS)
    print_json(args.kind, args.model, settings, rows)
    return 0


def _engines(args: Namespace, ours: NanoVLLM) -> Iterator[BenchEngine]:
    """One after the other: each is loaded when the one before it has been closed and its memory is free."""
    yield ours
    for name in dict.fromkeys(args.compare):
        if name == "hf":
            yield HuggingFace(args.model, engine_options(args), ours.dtype, ours.device)
        else:
            yield VLLM(args.model, engine_options(args), ours.dtype)


def _workloads(args: Namespace) -> list[Workload]:
    input_len = _INPUT_LEN if args.input_len is None else args.input_len
    output_len = _OUTPUT_LEN if args.output_len is None else args.output_len
    if args.kind == "throughput":
        if args.workload is not None:
            if args.mixed or args.input_len is not None or args.output_len is not None:
                raise ValueError(f"--workload {args.workload} has lengths of its own: leave out --input-len etc.")
            return [named(args.workload)]
        counts = args.batch_sizes or [args.num_prompts if args.num_prompts is not None else 64]
        return [uniform(count, input_len, output_len, mixed=args.mixed) for count in counts]
    if output_len < 2:
        raise ValueError(f"--output-len must be at least 2 to time a step, got {output_len}")
    return [uniform(count, input_len, output_len) for count in args.batch_sizes]


def _throughput(engine: BenchEngine, workload: Workload, repeats: int, vocab_size: int) -> _Row:
    seconds = _time_runs(engine, workload, repeats, vocab_size)
    rates = [workload.num_output_tokens / s for s in seconds]
    return {
        **_describe(engine, workload),
        "output_tokens_per_second": median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "total_tokens_per_second": (workload.num_prompt_tokens + workload.num_output_tokens) / median(seconds),
        "seconds": seconds,
    }


def _latency(engine: BenchEngine, workload: Workload, repeats: int, vocab_size: int) -> _Row:
    """A step's time is (all output tokens - one output token) / (their number - 1), from runs of both kinds in turn."""
    first_seconds = _time_runs(engine, workload.with_max_tokens(1), repeats, vocab_size)
    seconds = _time_runs(engine, workload, repeats, vocab_size, first_variant=repeats + 1)
    num_steps = workload.max_tokens[0] - 1
    steps = [1000 * (s - median(first_seconds)) / num_steps for s in seconds]
    return {
        **_describe(engine, workload),
        "first_token_ms": 1000 * median(first_seconds),
        "step_ms": median(steps),
        "slowest": max(steps),
        "fastest": min(steps),
        "output_tokens_per_second": 1000 * len(workload.prompts) / median(steps),
        "first_token_seconds": first_seconds,
        "seconds": seconds,
    }


def _time_runs(
    engine: BenchEngine, workload: Workload, repeats: int, vocab_size: int, first_variant: int = 0
) -> list[float]:
    """Seconds of each run. The warm-up takes the last variant; the first measured run is the workload itself."""
    engine.run(workload.variant(first_variant + repeats, vocab_size))
    seconds = []
    for number in range(repeats):
        variant = workload.variant(first_variant + number, vocab_size)
        start = perf_counter()
        engine.run(variant)
        seconds.append(perf_counter() - start)
        print(f"{engine.name}, {workload.name}: run {number + 1} of {repeats}, {seconds[-1]:.2f} s", file=sys.stderr)
    return seconds


def _describe(engine: BenchEngine, workload: Workload) -> _Row:
    return {
        "engine": engine.name,
        "version": engine.version,
        "workload": workload.name,
        "num_prompts": len(workload.prompts),
        "num_prompt_tokens": workload.num_prompt_tokens,
        "num_output_tokens": workload.num_output_tokens,
    }


def _add_speedups(rows: Sequence[_Row]) -> None:
    """How many times the tokens a second of each other engine nanovllm makes; a step of latency is a token a prompt."""
    ours = {row["workload"]: row["output_tokens_per_second"] for row in rows if row["engine"] == NanoVLLM.name}
    for row in rows:
        if row["engine"] != NanoVLLM.name:
            row["nanovllm_speedup"] = ours[row["workload"]] / row["output_tokens_per_second"]
