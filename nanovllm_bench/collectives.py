"""time_collectives: what the communication of a decode step takes by itself, on the ranks of a running engine.

Owns the count of a model's collectives. Invariant: every rank calls it at the same time with the same number.
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch

from nanovllm.layers.embedding import Embedding
from nanovllm.layers.experts import Experts
from nanovllm.layers.linear import RowParallelLinear
from nanovllm.layers.summing_norm import SummingNorm

_NUM_STEPS = 20


def time_collectives(num_rows: int, model: Any) -> float:
    """Milliseconds, the median of several steps of `num_rows` requests; on a GPU from a CUDA graph, as steps run.

    With the norms behind sums, where one kernel does both.
    """
    head, table = model.lm_head, model.embed_tokens.spec
    tp, device = head.tp, next(model.parameters()).device
    norms = [module for module in model.modules() if isinstance(module, SummingNorm)]
    num_sums = sum(type(module) in (RowParallelLinear, Experts, Embedding) for module in model.modules()) - len(norms)
    hidden = torch.zeros(num_rows, table.in_features, dtype=table.dtype, device=device)
    logits = torch.zeros(num_rows, table.num_outputs, dtype=table.dtype, device=device)

    def step() -> None:
        for _ in range(num_sums):
            tp.all_reduce(hidden)
        for norm in norms:
            norm(hidden, hidden)
        tp.all_gather(logits, head.vocab_size)

    run: Callable[[], None] = step
    if device.type == "cuda":
        step()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
        run = graph.replay
    seconds = []
    for _ in range(_NUM_STEPS):
        start = perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(perf_counter() - start)
    return 1000 * median(seconds)
