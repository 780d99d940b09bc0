"""`nanovllm bench ablation`: each optimization switched off alone, and what it was worth.

Owns the list of optimizations and the workload that shows each. Invariant: every measurement is a process of its own,
so no variant inherits memory, caches of tokens or warmed-up kernels of another.
"""

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanovllm.bench.report import print_record, print_table
from nanovllm.cli.options import engine_options


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """base and off: flags with it and without it. shown_by: names in `MEASURES`."""

    name: str
    off: tuple[str, ...]
    shown_by: tuple[str, ...]
    meaning: str
    base: tuple[str, ...] = ()
    on_gpu_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A run of `nanovllm bench`, by device, and the figure in its JSON that counts."""

    on_gpu: tuple[str, ...]
    on_cpu: tuple[str, ...]
    figure: str
    title: str
    more_is_better: bool


MEASURES = {
    "throughput": Measure(
        on_gpu=("throughput", "--workload", "offline"),
        on_cpu=("throughput", "--num-prompts", "8", "--input-len", "64", "--output-len", "64"),
        figure="output_tokens_per_second",
        title="output tok/s",
        more_is_better=True,
    ),
    "latency": Measure(
        on_gpu=("latency", "--workload", "decode_1"),
        on_cpu=("latency", "--input-len", "64", "--output-len", "64"),
        figure="step_ms",
        title="ms a step, batch 1",
        more_is_better=False,
    ),
    "prefix": Measure(
        on_gpu=("prefix",),
        on_cpu=("prefix", "--num-prompts", "16", "--prefix-len", "160", "--input-len", "16", "--output-len", "16"),
        figure="output_tokens_per_second",
        title="output tok/s, shared prefix",
        more_is_better=True,
    ),
    "arrivals": Measure(
        on_gpu=("latency", "--arrivals"),
        on_cpu=(
            *("latency", "--arrivals", "--num-streams", "4", "--arrival-len", "240"),
            *("--arrival-ms", "500", "--seconds", "4"),
        ),
        figure="gap_p99_ms",
        title="p99 ms between tokens, prompts arriving",
        more_is_better=False,
    ),
}

ABLATIONS = (
    Ablation(
        name="prefix caching",
        off=("--no-enable-prefix-caching",),
        shown_by=("prefix",),
        meaning="prompts that begin alike compute their beginning once and keep its keys and values once",
    ),
    Ablation(
        name="CUDA graphs",
        off=("--enforce-eager",),
        shown_by=("throughput", "latency"),
        meaning="a whole decode step is one launch; without them the CPU launches kernel by kernel and the GPU waits",
        on_gpu_only=True,
    ),
    Ablation(
        name="own kernels, against torch.compile",
        off=("--compilation", "inductor"),
        shown_by=("throughput", "latency"),
        meaning="norms, activations and rotation in this project's kernels instead of those that the compiler writes",
    ),
    Ablation(
        name="own kernels, against plain PyTorch",
        off=("--compilation", "none"),
        shown_by=("throughput", "latency"),
        meaning="the same against one PyTorch operation after the other, each reading and writing memory",
    ),
    Ablation(
        name="overlap of planning and running",
        off=("--overlap-depth", "1"),
        shown_by=("throughput", "latency"),
        meaning="the next step is planned while the device runs the last one, so the device does not wait for Python",
        on_gpu_only=True,
    ),
    Ablation(
        name="chunked prefill",
        base=("--max-num-batched-tokens", "128"),
        off=("--no-enable-chunked-prefill",),
        shown_by=("arrivals",),
        meaning="a long prompt is computed in parts, so running requests wait for a part and not for all of it",
    ),
)


def run(args: Namespace) -> int:
    device = engine_options(args).get("device", "auto")
    on_gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    known: dict[tuple[str, ...], dict[str, Any]] = {}
    rows = []
    for ablation in ABLATIONS:
        if ablation.on_gpu_only and not on_gpu:
            continue
        for name in ablation.shown_by:
            measure = MEASURES[name]
            command = measure.on_gpu if on_gpu else measure.on_cpu
            on, off = (_measure(args, (*command, *flags), known) for flags in (ablation.base, ablation.off))
            with_it, without = on["results"][0][measure.figure], off["results"][0][measure.figure]
            rows.append(
                {
                    "engine": "nanovllm",
                    "workload": name,
                    "optimization": ablation.name,
                    "figure": measure.title,
                    "with": with_it,
                    "without": without,
                    "worth": with_it / without if measure.more_is_better else without / with_it,
                    "runs": [on, off],
                }
            )
    columns = {"optimization": "optimization", "measured": "figure", "with": "with", "without": "without"}
    print_table(rows, {**columns, "times better": "worth"})
    print()
    for ablation in ABLATIONS:
        if ablation.on_gpu_only <= on_gpu:
            worth = " and ".join(f"{row['worth']:.2f}" for row in rows if row["optimization"] == ablation.name)
            print(f"{ablation.name}: {worth} times better; {ablation.meaning}.")
    print()
    print_record(args, {"settings": engine_options(args), "results": rows})
    return 0


def _measure(args: Namespace, command: tuple[str, ...], known: dict[tuple[str, ...], dict[str, Any]]) -> dict[str, Any]:
    """The JSON record of `nanovllm bench COMMAND`, run in a process of its own, once."""
    if command not in known:
        print(f"nanovllm bench {' '.join(command)}", file=sys.stderr, flush=True)
        options = _flags(engine_options(args))
        start = [sys.executable, "-m", "nanovllm.cli.main", "bench", *command[:1]]
        result = subprocess.run(
            [*start, "--model", args.model, "--repeat", str(args.repeats), *options, *command[1:]],
            stdout=subprocess.PIPE,
            text=True,
        )
        if result.returncode:
            raise RuntimeError(f"nanovllm bench {' '.join(command)} failed; its own message is above")
        known[command] = json.loads(result.stdout.splitlines()[-1])
    return known[command]


def _flags(options: Mapping[str, Any]) -> Sequence[str]:
    """Engine options as they are typed."""
    flags = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={value}")
    return flags
