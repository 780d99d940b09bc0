"""`nanovllm bench start`: where the time goes from the start of a process to its first token, and with `--first-use`
what each kind of step takes when it first comes.

Owns the two situations: cold, with empty caches of compiled kernels, and warm, with what the cold start left there.
Compiling has figures of its own beside the parts in which it happens (`start_probe.py` measures it), added up over
the cores that do it at the same time.
Invariant: every start is a process of its own. Files are not evicted from the operating system's cache: the model's
are read as they are after a first use.
"""

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import time
from typing import Any

from nanovllm import __version__
from nanovllm.cli.options import engine_options
from nanovllm.model_files.demo_model import demo_cache_dir
from nanovllm_bench.first_use import LIMIT_SECONDS
from nanovllm_bench.report import print_record, print_table

_PARTS = {
    "python_seconds": "Python itself",
    "import_seconds": "import torch, transformers and this package",
    "config_seconds": "find the checkpoint, read its config",
    "tokenizer_seconds": "tokenizer",
    "weights_seconds": "weights (on a CPU also: build the C++ kernels, pack)",
    "memory_seconds": "size of the KV cache (on a GPU: compile kernels, run the largest step)",
    "runner_seconds": "KV cache, rows (on a GPU: capture the largest decode step)",
    "other_seconds": "the rest of LLM(...)",
    "construct_seconds": "= LLM(...), from call to ready",
    "construct_compile_seconds": "  compiling kernels in that time, on all cores together",
    "first_token_seconds": "first token of a 128-token prompt (on a GPU: captures)",
    "total_seconds": "= from the start of the process to its first token",
    "compile_seconds": "  compiling kernels in that time, on all cores together",
    "second_token_seconds": "first token of another such prompt",
}


def run(args: Namespace) -> int:
    options = engine_options(args)
    more = ["first-use"] if args.first_use else []
    with tempfile.TemporaryDirectory(prefix="nanovllm-start-") as caches:
        environment = {**os.environ, **_empty_caches(Path(caches))}
        cold = _start(args.model, options, environment, more)
        warm = [_start(args.model, options, environment, more) for _ in range(1 if args.first_use else args.repeats)]
    if args.first_use:
        return _report_first_use(args, options, {"cold": cold, "warm": warm[0]})
    typical = {name: median(run[name] for run in warm) for name in _PARTS}
    slowest = {name: max(run[name] for run in warm) for name in _PARTS}
    rows = [
        {"part": text, "cold": cold[name], "warm": typical[name], "slowest": slowest[name]}
        for name, text in _PARTS.items()
    ]
    print_table(rows, {"seconds": "part", "cold": "cold", "warm": "warm", "slowest warm": "slowest"})
    row = {
        "engine": "nanovllm",
        "version": __version__,
        "workload": "start",
        "cold_seconds": cold["construct_seconds"],
        "warm_seconds": typical["construct_seconds"],
        "cold": cold,
        "warm": warm,
    }
    print_record(args, {"settings": options, "results": [row]})
    return 0


def _report_first_use(args: Namespace, options: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> int:
    rows, late = [], []
    for cold, warm in zip(runs["cold"]["steps"], runs["warm"]["steps"], strict=True):
        row = {"kind": cold["kind"], "kernels": len(cold["kernels"])}
        for name, step in (("cold", cold), ("warm", warm)):
            row |= {name: step["first_seconds"], f"{name} 2nd": step["second_seconds"]}
            if step["first_seconds"] - step["second_seconds"] > LIMIT_SECONDS[name]:
                late.append(f"{cold['kind']} ({name})")
        rows.append(row)
    columns = ("cold", "cold 2nd", "warm", "warm 2nd")
    print_table(rows, {"kind of step": "kind", **{name: name for name in columns}, "kernels": "kernels"})
    print(f"later than {LIMIT_SECONDS['cold']} s (cold) or {LIMIT_SECONDS['warm']} s: {', '.join(late) or 'nothing'}")
    row = {"engine": "nanovllm", "version": __version__, "workload": "first_use", **runs, "late": late}
    print_record(args, {"settings": options, "results": [row]})
    return 0


def _empty_caches(folder: Path) -> dict[str, str]:
    """Environment variables that move every cache of compiled code into `folder`, and leave models where they are."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if demo_cache_dir().exists():
        (folder / "nanovllm").mkdir()
        (folder / "nanovllm" / demo_cache_dir().name).symlink_to(demo_cache_dir())
    return {
        "XDG_CACHE_HOME": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "CUDA_CACHE_PATH": str(folder / "cuda"),
        "HF_HOME": os.environ.get("HF_HOME") or str(home / "huggingface"),
    }


def _start(
    model: str, options: Mapping[str, Any], environment: Mapping[str, str], more: Sequence[str] = ()
) -> dict[str, Any]:
    command = [sys.executable, "-m", "nanovllm_bench.start_probe", str(time()), model, json.dumps(options), *more]
    result = subprocess.run(command, env=dict(environment), stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise RuntimeError(f"the start failed with status {result.returncode}; its own message is above")
    return dict(json.loads(result.stdout.splitlines()[-1]))
