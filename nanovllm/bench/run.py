"""`nanovllm bench KIND`: hands over to the module of the kind.

Owns the list. Invariant: imports only what the kind needs.
"""

from argparse import Namespace
from importlib import import_module

_KINDS = {
    "throughput": "nanovllm.bench.measure",
    "prefill": "nanovllm.bench.measure",
    "prefix": "nanovllm.bench.measure",
    "latency": "nanovllm.bench.measure",
    "start": "nanovllm.bench.start",
    "ablation": "nanovllm.bench.ablation",
    "parallel": "nanovllm.bench.parallel",
    "chart": "nanovllm.bench.chart",
}


def run(args: Namespace) -> int:
    if getattr(args, "repeats", 1) < 1:
        raise ValueError(f"--repeat must be at least 1, got {args.repeats}")
    return int(import_module(_KINDS[args.kind]).run(args))
