"""`python -m nanovllm_bench.sampling`: one step of the sampler, with the stages that requests may ask for.

Owns that measurement: what plain temperature costs, and what each stage adds when all rows of the batch ask for it.
Invariant: all variants see the same logits, in turn, and the median of their runs is reported; each run comes right
after one of the same variant that is not counted, as in an engine, and so does not pay for what another one left in the
caches of host and device. A stage that nobody asks for costs nothing: `plain` is what it is whatever else the sampler
can do.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from nanovllm.engine.scheduler_output import NewRow, SchedulerOutput
from nanovllm.sampling.rows import SampledRows
from nanovllm.sampling.sampler import Sampler
from nanovllm.sampling_params import SamplingParams

_FILTERS = {"min_p": 0.02, "top_k": 50, "top_p": 0.9}
_PENALTIES = {"repetition_penalty": 1.1, "frequency_penalty": 0.1, "presence_penalty": 0.1}
_LISTS = {"logit_bias": {7: 1.0, 9: -1.0}, "min_tokens": 10}
VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "plain": {},
    "filters": _FILTERS,
    "penalties": _PENALTIES,
    "bias, min_tokens": _LISTS,
    "5 logprobs": {"logprobs": 5},
    "everything": {**_FILTERS, **_PENALTIES, **_LISTS, "logprobs": 5},
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m nanovllm_bench.sampling", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--runs", type=int, default=10, help="the median of so many is reported")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    times = measure(args.batch_size, args.vocab_size, args.runs, torch.device(args.device))
    print(f"{'stages':18} {'ms':>9} {'of plain':>9}")
    for name, seconds in times.items():
        print(f"{name:18} {seconds * 1e3:9.3f} {seconds / times['plain']:9.2f}")
    return 0


@torch.inference_mode()
def measure(batch_size: int, vocab_size: int, num_runs: int, device: torch.device) -> dict[str, float]:
    """Seconds a step, by variant; on a GPU the host's part is in it."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(batch_size, vocab_size, generator=generator, device=device) * 3
    logits = logits.bfloat16()
    rows_host = np.arange(batch_size, dtype=np.int32)
    positions_host = np.full(batch_size, 20)
    positions = torch.from_numpy(positions_host).int().to(device)
    rows = SampledRows(rows_host, torch.from_numpy(rows_host).to(device), positions_host, positions)
    samplers = {}
    for name, options in VARIANTS.items():
        samplers[name] = Sampler(batch_size, vocab_size, device)
        samplers[name].enter(_new_requests(batch_size, SamplingParams(**options)))

    def step(sampler: Sampler) -> float:
        _wait(device)
        start = perf_counter()
        tokens = sampler.sample(logits, rows)
        if sampler.pipeline is not None:
            sampler.pipeline.logprobs(logits, tokens, rows)
        _wait(device)
        return perf_counter() - start

    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(num_runs):
        for name, sampler in samplers.items():
            step(sampler)
            times[name].append(step(sampler))
    return {name: median(seconds) for name, seconds in times.items()}


def _new_requests(batch_size: int, params: SamplingParams) -> SchedulerOutput:
    """A plan in which each row is entered by a request of 15 prompt and 5 output tokens."""
    options: dict[str, Any] = {"num_computed_tokens": 0, "num_prompt_tokens": 15, "block_ids": [], "params": params}
    rows = range(batch_size)
    news = [NewRow(row=row, seed=row, stop_token_ids=(0, 1), token_ids=list(range(20)), **options) for row in rows]
    none: dict[str, Any] = {name: [] for name in ("rows", "num_scheduled_tokens", "num_computed_tokens")}
    return SchedulerOutput(new_rows=news, new_blocks=[], num_samples=[], token_ids=[], num_decodes=0, **none)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    raise SystemExit(main())
