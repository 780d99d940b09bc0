"""Seconds of work on one device by itself: of a layer, or of products, for the benchmarks that start no engine.

Owns how it is repeated. Invariant: on a GPU a run is one CUDA graph, as in decoding, and runs follow one another
without a wait, so that launches cost nothing.
"""

from collections.abc import Callable
from time import perf_counter

import torch


@torch.inference_mode()
def time_runs(work: Callable[[], object], num_runs: int, device: torch.device) -> list[float]:
    """Seconds of each run of `work`, after one that is not counted: it compiles, or tunes."""
    work()
    if device.type == "cpu":
        times = []
        for _ in range(num_runs):
            start = perf_counter()
            work()
            times.append(perf_counter() - start)
        return times
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_runs + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize(device)
    return [first.elapsed_time(second) / 1e3 for first, second in zip(events, events[1:], strict=False)]
