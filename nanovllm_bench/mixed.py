"""`nanovllm bench latency --arrivals`: how steadily running requests get their tokens while prompts keep arriving.

Owns this one experiment: a number of streams decode without end, and every so many milliseconds a long prompt arrives
that wants one token. Invariant: arrivals follow the clock and not the engine, so an engine that cannot keep up shows it
in its gaps and in the first tokens of the arrivals.
"""

import random
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from time import perf_counter
from typing import Any

from nanovllm.cli.options import engine_options
from nanovllm.llm import LLM
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm_bench.engines import NanoVLLM
from nanovllm_bench.report import print_record, print_table

_COLUMNS = {
    "streams": "num_streams",
    "arrivals": "num_arrivals",
    "answered": "num_answered",
    "gap p50 ms": "gap_p50_ms",
    "gap p99 ms": "gap_p99_ms",
    "longest": "gap_max_ms",
    "arrival's first token p50 ms": "first_token_p50_ms",
    "p99": "first_token_p99_ms",
}


def run_mixed(args: Namespace) -> int:
    if min(args.num_streams, args.arrival_len) < 1 or min(args.arrival_ms, args.seconds) <= 0:
        raise ValueError("--num-streams, --arrival-len, --arrival-ms and --seconds must be more than 0")
    engine = NanoVLLM(args.model, engine_options(args))
    with closing(engine):
        sizes = args.num_streams, args.arrival_len, args.arrival_ms / 1000
        _drive(engine.llm, *sizes, args.seconds)  # warm up: as long, for every batch size to have come up
        rows = [_drive(engine.llm, *sizes, args.seconds) for _ in range(args.repeats)]
    print_table(rows, _COLUMNS)
    settings = {"dtype": engine.dtype, "device": engine.device, **engine_options(args)}
    print_record(args, {"settings": settings, "results": rows})
    return 0


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]


def _drive(llm: LLM, num_streams: int, arrival_len: int, interval: float, seconds: float) -> dict[str, Any]:
    rng = random.Random(0)
    vocab_size, longest = llm.model_config.vocab_size, llm.config.max_model_len
    assert longest is not None
    first_len = min(128, longest // 2)
    one_token = SamplingParams(
        temperature=0,
        max_tokens=1,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,  # a step that lists all tokens so far would be measured too
    )
    endless = replace(one_token, max_tokens=longest - first_len)

    def prompts(count: int, length: int) -> Iterator[list[int]]:
        return iter([rng.choices(range(vocab_size), k=length) for _ in range(count)])

    arriving = prompts(int(seconds / interval) + 2, arrival_len)  # drawn before the clock runs
    llm.reset_prefix_cache()
    last_token_at = dict.fromkeys((llm.add_request(p, endless) for p in prompts(num_streams, first_len)), 0.0)
    while not all(last_token_at.values()):
        last_token_at.update({output.request_id: perf_counter() for output in llm.step()})
    arrived_at: dict[str, float] = {}
    gaps: list[float] = []
    first_tokens: list[float] = []
    start = perf_counter()
    end, next_arrival, num_arrivals = start + seconds, start, 0
    while perf_counter() < end:
        while next_arrival <= min(perf_counter(), end):
            arrived_at[llm.add_request(next(arriving), one_token)] = next_arrival
            num_arrivals += 1
            next_arrival += interval
        outputs = llm.step()
        now = perf_counter()
        for output in outputs:
            name = output.request_id
            if name in arrived_at:
                first_tokens.append(1000 * (now - arrived_at.pop(name)))
                continue
            gaps.append(1000 * (now - last_token_at[name]))
            last_token_at[name] = now
            if output.finished:  # its length is reached: another one takes its place
                del last_token_at[name]
                last_token_at[llm.add_request(next(prompts(1, first_len)), endless)] = now
    llm.abort_request([*last_token_at, *arrived_at])
    while llm.has_unfinished_requests():
        llm.step()
    row: dict[str, Any] = {
        "engine": NanoVLLM.name,
        "version": NanoVLLM.version,
        "workload": f"{num_streams} streams, {arrival_len} tokens every {1000 * interval:g} ms",
        "num_streams": num_streams,
        "num_arrivals": num_arrivals,
        "num_answered": len(first_tokens),
        "num_gaps": len(gaps),
        "seconds": seconds,
    }
    if gaps:
        row |= {"gap_p50_ms": percentile(gaps, 0.5), "gap_p99_ms": percentile(gaps, 0.99), "gap_max_ms": max(gaps)}
    if first_tokens:
        row["first_token_p50_ms"] = percentile(first_tokens, 0.5)
        row["first_token_p99_ms"] = percentile(first_tokens, 0.99)
    return row
