"""`nanovllm bench serve`: what users of a server see while requests arrive, beside the engine alone or another server.

Owns the experiment: first tokens, the gaps between tokens, the requests that met their limits, and what the server's
process takes of the processor for a token. Invariant: all that are compared get the same requests at the same times,
one after the other; a request that failed is counted, and is in no other figure.
"""

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import monotonic, sleep
from typing import Any

from nanovllm import __version__
from nanovllm.cli.descriptors import allow_many_descriptors
from nanovllm.cli.options import engine_options
from nanovllm_bench.http_load import Exchange, Reply, Target, arrival_offsets, drive, read_reply, run_loop
from nanovllm_bench.mixed import percentile
from nanovllm_bench.report import print_record, print_table
from nanovllm_bench.serving_engine import Plan
from nanovllm_bench.workload import Workload

_COLUMNS = {
    "engine": "engine",
    "requests": "num_prompts",
    "failed": "num_failed",
    "output tok/s": "output_tokens_per_second",
    "first token ms p50": "first_token_p50_ms",
    "p99": "first_token_p99_ms",
    "gap ms p50": "gap_p50_ms",
    "p99 ": "gap_p99_ms",
    "alone": "alone_first_token_ms",
    "good req/s": "goodput",
    "server us/tok": "server_us_per_token",
}
_LIMITS = {"ttft": "first token", "tpot": "mean gap", "e2el": "whole answer"}  # vLLM's names
_FOREIGN_VOCAB_SIZE = 256  # of a server that says nothing of it: the ids that every vocabulary has
_START_SECONDS = 3600  # a guard: a large model may be fetched first
_TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def run(args: Namespace) -> int:
    if args.num_prompts < 1 or args.output_len < 2 or args.request_rate <= 0 or args.idle_connections < 0:
        raise ValueError("--num-prompts must be at least 1, --output-len 2, --request-rate more than 0")
    limits = _read_limits(args.goodput)
    allow_many_descriptors()
    options = engine_options(args)
    offsets = arrival_offsets(args.num_prompts, args.request_rate)
    plan = Plan(args.model, options, args.input_len, args.output_len, args.mixed, offsets, args.num_alone, args.repeats)
    workload = plan.workload()
    rate = "at once" if args.request_rate == float("inf") else f"{args.request_rate:g} a second"
    about = {"workload": f"{workload.name}, {rate}", "num_prompts": len(offsets)}
    rows: list[dict[str, Any]] = []
    if args.url:
        for url in args.url:
            row = run_loop(_measure(Target(url, args.api_key), args, plan, _FOREIGN_VOCAB_SIZE, None))
            rows.append({"engine": url, **about, **_figures(row, limits)})
    else:
        engine = _run_engine(plan)
        rows.append({"engine": "LLM", "version": __version__, **about, **_figures(engine, limits)})
        with _serve(args.model, options) as (url, pid):
            row = run_loop(_measure(Target(url), args, plan, engine.vocab_size, pid))
        rows.append({"engine": "nanovllm serve", "version": __version__, **about, **_figures(row, limits)})
    print_table(rows, _COLUMNS)
    settings = {
        "repeats": args.repeats, "request_rate": str(args.request_rate), "max_concurrency": args.max_concurrency,
        "idle_connections": args.idle_connections, "route": "chat" if args.chat else "completions",
        "goodput": limits, **options,
    }  # fmt: skip
    print_record(args, {"settings": settings, "results": rows})
    return 0


def _read_limits(texts: Sequence[str]) -> dict[str, float]:
    """From "ttft:100" to {"ttft": 100.0}, in milliseconds."""
    limits = {}
    for text in texts:
        name, _, value = text.partition(":")
        try:
            limits[name] = float(value)
        except ValueError:
            value = ""
        if not value or name not in _LIMITS or limits[name] <= 0:
            raise ValueError(f"--goodput takes {', '.join(_LIMITS)}, each with milliseconds: ttft:100, got {text!r}")
    return limits


# -- what was measured, and what is said of it --


@dataclass(frozen=True)
class _Measured:
    """runs: the replies of each, and the seconds it took. cpu_seconds: of the server's process in these runs."""

    runs: list[list[Reply]]
    seconds: list[float]
    alone: list[Reply]
    num_failed: int = 0
    errors: Sequence[str] = ()
    cpu_seconds: float | None = None
    vocab_size: int = _FOREIGN_VOCAB_SIZE


def _figures(measured: _Measured, limits: Mapping[str, float]) -> dict[str, Any]:
    replies = [reply for run in measured.runs for reply in run]
    if not replies:
        raise RuntimeError(f"every request failed: {'; '.join(measured.errors)}")
    firsts = [1000 * reply.times[0] for reply in replies]
    gaps = [1000 * (b - a) for reply in replies for a, b in zip(reply.times, reply.times[1:], strict=False)] or [0.0]
    counts = [sum(reply.num_tokens for reply in run) for run in measured.runs]
    rates = [count / seconds for count, seconds in zip(counts, measured.seconds, strict=True)]
    figures: dict[str, Any] = {
        "num_failed": measured.num_failed,
        "errors": list(measured.errors),
        "num_output_tokens": sum(counts),
        "seconds": measured.seconds,
        "output_tokens_per_second": median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "first_token_p50_ms": percentile(firsts, 0.5),
        "first_token_p99_ms": percentile(firsts, 0.99),
        "gap_p50_ms": percentile(gaps, 0.5),
        "gap_p99_ms": percentile(gaps, 0.99),
        "gap_max_ms": max(gaps),
        "tokens_per_event": sum(counts) / sum(len(reply.times) for reply in replies),
    }
    if measured.alone:
        figures["alone_first_token_ms"] = median(1000 * reply.times[0] for reply in measured.alone)
    if limits:
        num_good = sum(_is_good(reply, limits) for reply in replies)
        figures["goodput"] = num_good / sum(measured.seconds)
        figures["share_good"] = num_good / (len(replies) + measured.num_failed)
    if measured.cpu_seconds is not None:
        figures["server_us_per_token"] = 1e6 * measured.cpu_seconds / sum(counts)
    return figures


def _is_good(reply: Reply, limits: Mapping[str, float]) -> bool:
    took = {
        "ttft": reply.times[0],
        "tpot": (reply.end - reply.times[0]) / max(1, reply.num_tokens - 1),
        "e2el": reply.end,
    }
    return all(1000 * took[name] <= limit for name, limit in limits.items())


# -- the engine alone --


def _run_engine(plan: Plan) -> _Measured:
    command = [sys.executable, "-m", "nanovllm_bench.serving_engine", json.dumps(asdict(plan))]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise RuntimeError(f"the engine failed with status {result.returncode}; its own message is above")
    record = json.loads(result.stdout.splitlines()[-1])
    runs = [[Reply(**reply) for reply in run] for run in record["runs"]]
    is_at_once = plan.offsets[-1] == 0.0  # then all prompts may go to `generate`, whose rate is the one to reach
    seconds = record["generate_seconds"] if is_at_once else [_span(run, plan.offsets) for run in runs]
    alone = [Reply(**reply) for reply in record["alone"]]
    return _Measured(runs, seconds, alone, vocab_size=record["vocab_size"])


def _span(run: Sequence[Reply], offsets: Sequence[float]) -> float:
    return max(reply.end + offset for reply, offset in zip(run, offsets, strict=True))


# -- a server --


@contextmanager
def _serve(model: str, options: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """`nanovllm serve` as users start it: its URL, and the process that answers."""
    flags = [flag for name, value in options.items() for flag in _flags(name, value)]
    command = [sys.executable, "-m", "nanovllm.cli.main", "serve", model, "--port", "0", *flags]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            yield _url_of(process, log), process.pid
        finally:
            process.terminate()
            process.wait()


def _url_of(process: "subprocess.Popen[bytes]", log: Any) -> str:
    deadline = monotonic() + _START_SECONDS
    while process.poll() is None and monotonic() < deadline:
        log.seek(0)
        for line in log:
            if line.startswith("ready after"):
                return str(line.split()[-1])
        sleep(0.05)
    log.seek(0)
    raise RuntimeError(f"the server did not start:\n{log.read()[-3000:]}")


def _flags(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    if isinstance(value, dict):
        return [flag, json.dumps(value)]
    return [part for one in (value if isinstance(value, (list, tuple)) else [value]) for part in (flag, str(one))]


def _cpu_seconds(pid: int | None) -> float | None:
    """User and system time of a process so far; None where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / _TICK


async def _measure(target: Target, args: Namespace, plan: Plan, vocab_size: int, pid: int | None) -> _Measured:
    model = (await target.ask("GET", "/v1/models"))["data"][0]["id"]
    path = "/v1/chat/completions" if args.chat else "/v1/completions"

    def bodies(workload: Workload) -> list[dict[str, Any]]:
        variant = zip(workload.prompts, workload.max_tokens, strict=True)
        return [_body(model, prompt, count, workload.temperature, args.chat) for prompt, count in variant]

    idle = await target.open_idle(args.idle_connections)
    workload, runs, seconds, errors, num_failed = plan.workload(), [], [], [], 0
    await drive(target, path, bodies(workload.variant(0, vocab_size)), plan.offsets, args.max_concurrency)  # to warm up
    cpu_before = _cpu_seconds(pid)
    for number in range(1, plan.repeats + 1):
        exchanges = await drive(
            target, path, bodies(workload.variant(number, vocab_size)), plan.offsets, args.max_concurrency
        )
        replies, failures = _read(exchanges)
        runs.append(replies)
        seconds.append(_seconds(exchanges))
        errors += failures[:3]
        num_failed += len(failures)
    cpu_after = _cpu_seconds(pid)
    alone = []
    for body in bodies(plan.alone().variant(plan.repeats + 1, vocab_size)):
        alone += _read(await drive(target, path, [body], [0.0], None))[0]
    for connection in idle:
        connection.close()
    target.close()
    cpu = None if cpu_before is None or cpu_after is None else cpu_after - cpu_before
    return _Measured(runs, seconds, alone, num_failed, errors, cpu)


def _body(model: str, prompt: list[int], num_tokens: int, temperature: float, is_chat: bool) -> dict[str, Any]:
    if is_chat:
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": " ".join(map(str, prompt))}]}
    else:
        asked = {"prompt": prompt}
    return {
        "model": model, **asked, "max_tokens": num_tokens, "temperature": temperature, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def _read(exchanges: Sequence[Exchange]) -> tuple[list[Reply], list[str]]:
    replies, failures = [], []
    for exchange in exchanges:
        try:
            replies.append(read_reply(exchange))
        except ValueError as error:
            failures.append(str(error))
    return replies, failures


def _seconds(exchanges: Sequence[Exchange]) -> float:
    """From the first request to the end of the last answer."""
    ends = [exchange.arrivals[-1][0] for exchange in exchanges if exchange.arrivals]
    return max(ends, default=0.0) - min(exchange.due for exchange in exchanges)
