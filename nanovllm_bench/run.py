"""`nanovllm bench KIND`: hands over to the module of the kind.

Owns the list. Invariant: imports only what the kind needs.
"""

from argparse import Namespace
from importlib import import_module

_KINDS = {
    "throughput": "nanovllm_bench.measure",
    "prefill": "nanovllm_bench.measure",
    "prefix": "nanovllm_bench.measure",
    "latency": "nanovllm_bench.measure",
    "start": "nanovllm_bench.start",
    "ablation": "nanovllm_bench.ablation",
    "parallel": "nanovllm_bench.parallel",
    "serve": "nanovllm_bench.serving",
    "attention": "nanovllm_bench.attention",
    "products": "nanovllm_bench.products",
    "quality": "nanovllm_bench.quality",
    "speculation": "nanovllm_bench.speculation",
    "adapters": "nanovllm_bench.adapters",
    "chart": "nanovllm_bench.chart",
}


def run(args: Namespace) -> int:
    if getattr(args, "repeats", 1) < 1:
        raise ValueError(f"--repeat must be at least 1, got {args.repeats}")
    return int(import_module(_KINDS[args.kind]).run(args))
