"""`nanovllm bench throughput`, `prefill`, `prefix` and `latency`: workloads, timed on one engine after the other.

Owns what is timed and how often. Invariant: every engine runs the same workloads, one engine after the other in one
call, each with one warm-up run that is not counted; figures are medians, and the spread of the runs stands beside
them. Where our own counters are known, the host's share of the time and the share of the physical floor are too.
"""

import sys
from argparse import Namespace
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from statistics import median
from typing import Any

from nanovllm.cli.options import engine_options
from nanovllm.roofline.ceilings import measure_ceilings
from nanovllm.roofline.roofline import Ceilings, Work, report
from nanovllm_bench.elsewhere import EarlierBuild, OriginalNanoVLLM, check_checkout
from nanovllm_bench.engines import VLLM, BenchEngine, HuggingFace, NanoVLLM, check_installed
from nanovllm_bench.llama_cpp_engine import LlamaCpp
from nanovllm_bench.mixed import run_mixed
from nanovllm_bench.report import print_record, print_table
from nanovllm_bench.workload import Workload, named, shared_prefix, uniform

_Row = dict[str, Any]
_FIRST_COLUMNS = {"engine": "engine", "workload": "workload"}
_FIGURES = {  # by what a workload is about
    "output": {"output tok/s": "output_tokens_per_second"},
    "prefill": {"prompt tok/s": "prompt_tokens_per_second"},
    "latency": {"first token ms": "first_token_ms", "ms/step": "step_ms"},
}
_LAST_COLUMNS = {
    "slowest": "slowest",
    "fastest": "fastest",
    "host share": "host_share",
    "GB/s": "gigabytes_per_second",
    "TFLOP/s": "teraflops_per_second",
    "of floor": "share_of_floor",
    "nanovllm is x faster": "nanovllm_speedup",
}


def run(args: Namespace) -> int:
    if args.kind == "latency" and args.arrivals:
        return run_mixed(args)
    workloads = _workloads(args)
    for name in args.compare:
        check_installed(name, args.nano_vllm_python)
    if args.before is not None:
        check_checkout(args.before)
    if args.warm_up_len is not None and args.warm_up_len < 1:
        raise ValueError(f"--warm-up-len must be at least 1, got {args.warm_up_len}")
    if args.compare and (special := [workload.name for workload in workloads if not workload.is_plain]):
        raise ValueError(f"--workload {' '.join(special)} asks for what not every engine offers: leave out --compare")
    needs_tokenizer = any("structured_outputs" in workload.asks for workload in workloads)
    ours = NanoVLLM(args.model, engine_options(args), needs_tokenizer)
    size, num_devices = ours.model_size(), ours.num_devices
    settings = {"dtype": ours.dtype, "device": ours.device, "repeats": args.repeats, **engine_options(args)}
    vocab_size = ours.vocab_size
    rows: list[_Row] = []
    about = {workload.name: _about(workload, args) for workload in workloads}
    with closing(_engines(args, ours, needs_tokenizer)) as engines:
        for engine in engines:
            with closing(engine):
                for workload in workloads:
                    measure = measure_latency if about[workload.name] == "latency" else measure_throughput
                    rows.append(measure(engine, workload, args.repeats, vocab_size, args.warm_up_len))
    one = measure_ceilings(ours.device, ours.dtype)  # now that the engines have given their memory back
    ceilings = Ceilings(
        bytes_per_second=one.bytes_per_second * num_devices, flops_per_second=one.flops_per_second * num_devices
    )
    for row in rows:
        if "work" in row:
            row["roofline"] = report(Work(**row["work"]), size, ceilings, sum(row["seconds"]))
    rows.sort(key=lambda row: [workload.name for workload in workloads].index(row["workload"]))
    _add_speedups(rows, about)
    figures = {title: key for name in _FIGURES if name in about.values() for title, key in _FIGURES[name].items()}
    print_table(
        [_shown(row, figures.values(), _FIGURES[about[row["workload"]]].values()) for row in rows],
        {**_FIRST_COLUMNS, **figures, **_LAST_COLUMNS},
    )
    record = {"settings": settings, "ceilings": asdict(ceilings), "model_size": asdict(size), "results": rows}
    print_record(args, record)
    return 0


def _about(workload: Workload, args: Namespace) -> str:
    if args.kind == "latency" or workload.is_latency:
        return "latency"
    return "prefill" if workload.is_prefill else "output"


def _engines(args: Namespace, ours: NanoVLLM, needs_tokenizer: bool) -> Generator[BenchEngine]:
    """One after the other: each is loaded when the one before it has been closed and its memory is free."""
    options = engine_options(args)
    if args.before is None:
        yield ours
    else:
        with closing(EarlierBuild(args.before)) as earlier:
            yield ours
            earlier.load(args.model, options, needs_tokenizer)
            yield earlier
    for name in dict.fromkeys(args.compare):
        if name == "hf":
            yield HuggingFace(args.model, options, ours.dtype, ours.device)
        elif name == "vllm":
            yield VLLM(args.model, options, ours.dtype)
        elif name == "llama.cpp":
            yield LlamaCpp(args.model, options)
        else:
            yield OriginalNanoVLLM(args.model, options, args.nano_vllm_python)


def _workloads(args: Namespace) -> list[Workload]:
    if args.kind == "prefill":
        return [uniform(args.num_prompts, args.input_len, 1) if _is_custom(args) else named("prefill")]
    if args.kind == "prefix":
        sizes = args.num_prompts, args.prefix_len, args.input_len, args.output_len
        return [shared_prefix(*sizes) if _is_custom(args) else named("shared_prefix")]
    input_len = 64 if args.input_len is None else args.input_len
    output_len = 128 if args.output_len is None else args.output_len
    if args.workload:
        if args.input_len is not None or args.output_len is not None or (args.kind == "throughput" and args.mixed):
            raise ValueError(f"--workload {' '.join(args.workload)} has lengths of its own: leave out --input-len etc.")
        return [named(name) for name in dict.fromkeys(args.workload)]
    if args.kind == "throughput":
        counts = args.batch_sizes or [args.num_prompts if args.num_prompts is not None else 64]
        return [uniform(count, input_len, output_len, mixed=args.mixed) for count in counts]
    if output_len < 2:
        raise ValueError(f"--output-len must be at least 2 to time a step, got {output_len}")
    return [uniform(count, input_len, output_len) for count in args.batch_sizes or [1]]


def _is_custom(args: Namespace) -> bool:
    return any(getattr(args, name) != default for name, default in args.workload_defaults.items())


def measure_throughput(
    engine: BenchEngine, workload: Workload, repeats: int, vocab_size: int, warm_up_len: int | None = None
) -> _Row:
    runs = _time_runs(engine, workload, repeats, vocab_size, warm_up_len)
    seconds = runs["seconds"]
    num_tokens = workload.num_prompt_tokens if workload.is_prefill else workload.num_output_tokens
    rates = [num_tokens / s for s in seconds]
    return {
        **_describe(engine, workload),
        "output_tokens_per_second": workload.num_output_tokens / median(seconds),
        "prompt_tokens_per_second": workload.num_prompt_tokens / median(seconds),
        "total_tokens_per_second": (workload.num_prompt_tokens + workload.num_output_tokens) / median(seconds),
        "slowest": min(rates),
        "fastest": max(rates),
        **runs,
    }


def measure_latency(
    engine: BenchEngine, workload: Workload, repeats: int, vocab_size: int, warm_up_len: int | None = None
) -> _Row:
    """A step's time is (all output tokens - one output token) / (their number - 1), from runs of both kinds in turn."""
    num_prompts = len(workload.prompts)
    firsts = _time_runs(engine, workload.with_max_tokens(1), repeats, vocab_size, warm_up_len)
    first_ms = [1000 * s for s in firsts["seconds"]]
    num_steps = workload.max_tokens[0] - 1
    row = {**_describe(engine, workload), "first_token_ms": median(first_ms)}
    if num_steps == 0:
        rate = 1000 * num_prompts / median(first_ms)
        return {**row, "output_tokens_per_second": rate, "slowest": max(first_ms), "fastest": min(first_ms), **firsts}
    runs = _time_runs(engine, workload, repeats, vocab_size, warm_up_len, first_variant=repeats + 1)
    steps = [(1000 * s - median(first_ms)) / num_steps for s in runs["seconds"]]
    return {
        **row,
        "step_ms": median(steps),
        "output_tokens_per_second": 1000 * num_prompts / median(steps),
        "slowest": max(steps),
        "fastest": min(steps),
        "first_token_seconds": firsts["seconds"],
        **runs,
    }


def _time_runs(
    engine: BenchEngine,
    workload: Workload,
    repeats: int,
    vocab_size: int,
    warm_up_len: int | None,
    first_variant: int = 0,
) -> dict[str, Any]:
    """Seconds of each run; for our own engine also what all of them did and the host's share of their time.

    The warm-up takes the last variant; the first measured run is the workload itself.
    """
    warm_up = workload.variant(first_variant + repeats, vocab_size)
    engine.run(warm_up if warm_up_len is None else warm_up.at_most(warm_up_len))
    before = engine.counters() if isinstance(engine, NanoVLLM) else {}
    seconds = []
    for number in range(repeats):
        seconds.append(engine.run(workload.variant(first_variant + number, vocab_size)))
        print(f"{engine.name}, {workload.name}: run {number + 1} of {repeats}, {seconds[-1]:.3f} s", file=sys.stderr)
    if not isinstance(engine, NanoVLLM):
        return {"seconds": seconds}
    after = engine.counters()
    host_seconds = after["host_seconds"] - before["host_seconds"]
    work = asdict(Work.between(before, after))
    return {"seconds": seconds, "work": work, "host_share": host_seconds / sum(seconds)}


def _describe(engine: BenchEngine, workload: Workload) -> _Row:
    return {
        "engine": engine.name,
        "version": engine.version,
        "workload": workload.name,
        "num_prompts": len(workload.prompts),
        "num_prompt_tokens": workload.num_prompt_tokens,
        "num_output_tokens": workload.num_output_tokens,
    }


def _add_speedups(rows: Sequence[_Row], about: Mapping[str, str]) -> None:
    """How many times the tokens a second of each other engine nanovllm makes; a step of latency is a token a prompt."""
    scores = {name: f"{'prompt' if kind == 'prefill' else 'output'}_tokens_per_second" for name, kind in about.items()}
    ours = {row["workload"]: row[scores[row["workload"]]] for row in rows if row["engine"] == NanoVLLM.name}
    for row in rows:
        if row["engine"] != NanoVLLM.name:
            row["nanovllm_speedup"] = ours[row["workload"]] / row[scores[row["workload"]]]


def _shown(row: _Row, figures: Collection[str], own: Collection[str]) -> _Row:
    """A row as the table has it: of all `figures` its own ones, rates in units that fit, shares in per cent."""
    row = {name: value for name, value in row.items() if name in own or name not in figures}
    roofline = row.get("roofline")
    if roofline is None:
        return row
    return {
        **row,
        "host_share": f"{100 * row['host_share']:.1f} %",
        "gigabytes_per_second": roofline["bytes_per_second"] / 1e9,
        "teraflops_per_second": roofline["flops_per_second"] / 1e12,
        "share_of_floor": f"{100 * roofline['share_of_floor']:.0f} %",
    }
