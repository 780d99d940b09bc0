"""`nanovllm bench ablation`: each optimization switched off alone, and what it was worth.

Owns the list of optimizations and the workload that shows each. Invariant: every measurement is a process of its own,
so no variant inherits memory, caches of tokens or warmed-up kernels of another.
"""

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanovllm.cli.options import engine_options
from nanovllm.kernels.triton.common.launch import has_dependent_launch
from nanovllm_bench.report import print_record, print_table


def _everywhere(device: torch.device) -> bool:
    return True


def _on_gpus(device: torch.device) -> bool:
    return device.type == "cuda"


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """base and off: flags with it and without it. shown_by: names in `MEASURES`. exists: whether a device has it."""

    name: str
    off: tuple[str, ...]
    shown_by: tuple[str, ...]
    meaning: str
    base: tuple[str, ...] = ()
    base_on_cpu: tuple[str, ...] | None = None  # where it needs others there
    exists: Callable[[torch.device], bool] = _everywhere

    def sides(self, on_gpu: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The flags with it, the flags without it."""
        return self.base if on_gpu or self.base_on_cpu is None else self.base_on_cpu, self.off


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
        on_gpu=("throughput", "--num-prompts", "256", "--input-len", "512", "--output-len", "256", "--mixed"),
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
        exists=_on_gpus,
    ),
    Ablation(
        name="fused kernels",
        off=("--compilation", "none"),
        shown_by=("throughput", "latency"),
        meaning="this project's kernels for norms, activations and rotation, and on a GPU for products of few rows, "
        "against one PyTorch operation after the other, each reading and writing memory",
    ),
    Ablation(
        name="fused kernels, against torch.compile",
        off=("--compilation", "inductor"),
        shown_by=("throughput", "latency"),
        meaning="the same kernels against those that the compiler writes",
    ),
    Ablation(
        name="torch.compile",
        base=("--compilation", "inductor"),
        off=("--compilation", "none"),
        shown_by=("throughput", "latency"),
        meaning="what the compiler's kernels are worth where this project's are not used",
    ),
    Ablation(
        name="dependent launch",
        off=("--no-dependent-launch",),
        shown_by=("throughput", "latency"),
        meaning="a kernel starts, and asks for its weights, while the one before it still runs",
        exists=has_dependent_launch,
    ),
    Ablation(
        name="overlap of planning and running",
        off=("--overlap-depth", "1"),
        shown_by=("throughput", "latency"),
        meaning="the next step is planned while the device runs the last one, so the device does not wait for Python",
        exists=_on_gpus,
    ),
    Ablation(
        name="chunked prefill",
        base=("--max-num-batched-tokens", "512"),
        base_on_cpu=("--max-num-batched-tokens", "128"),
        off=("--no-enable-chunked-prefill",),
        shown_by=("arrivals",),
        meaning="a long prompt is computed in parts, so running requests wait for a part and not for all of it",
    ),
)


def run(args: Namespace) -> int:
    name = engine_options(args).get("device", "auto")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    on_gpu = device.type == "cuda"
    ablations = [ablation for ablation in _choose(args.only) if ablation.exists(device)]
    if not ablations:
        raise ValueError(f"--only {' '.join(args.only)}: {device} has nothing of the kind")
    known: dict[tuple[str, ...], dict[str, Any]] = {}
    rows = []
    for ablation in ablations:
        for name in ablation.shown_by:
            measure = MEASURES[name]
            command = measure.on_gpu if on_gpu else measure.on_cpu
            on, off = (_measure(args, (*command, *flags), known) for flags in ablation.sides(on_gpu))
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
            print(_shown(rows[-1]), file=sys.stderr, flush=True)  # at once: the rest takes minutes
    columns = {"optimization": "optimization", "measured": "figure", "with": "with", "without": "without"}
    print_table(rows, {**columns, "times better": "worth"})
    print()
    for ablation in ablations:
        worth = " and ".join(f"{row['worth']:.2f}" for row in rows if row["optimization"] == ablation.name)
        print(f"{ablation.name}: {worth} times better; {ablation.meaning}.")
    print()
    print_record(args, {"settings": engine_options(args), "results": rows})
    return 0


def _shown(row: Mapping[str, Any]) -> str:
    figures = f"{row['with']:.5g} with it, {row['without']:.5g} without"
    return f"{row['optimization']}: {row['worth']:.2f} times better ({row['figure']}: {figures})"


def _choose(names: Sequence[str] | None) -> Sequence[Ablation]:
    """Those whose name holds one of the names, all for None. Raises ValueError for a name that stands nowhere."""
    if names is None:
        return ABLATIONS
    for name in names:
        if not any(name.lower() in ablation.name.lower() for ablation in ABLATIONS):
            raise ValueError(f"--only {name!r}: there is {', '.join(repr(ablation.name) for ablation in ABLATIONS)}")
    return [ablation for ablation in ABLATIONS if any(name.lower() in ablation.name.lower() for name in names)]


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
