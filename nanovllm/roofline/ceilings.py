"""What a device can do at the most, measured: bytes a second in a plain pass over memory, FLOP/s in a matrix product.

Owns the two measurements (a second or less). Invariant: each is the best of several tries on memory far larger than the
device's caches, so that a share of it says how much is left to gain.
"""

from collections.abc import Callable
from time import perf_counter

import torch

from nanovllm.roofline.roofline import Ceilings

_NUM_TRIES = 5


def measure_ceilings(device: str, dtype: str) -> Ceilings:
    """On this device, with matrices of this dtype; on a CPU with torch's threads."""
    where, kind = torch.device(device), getattr(torch, dtype)
    on_gpu = where.type == "cuda"
    source, target = torch.zeros(2, 2**28 if on_gpu else 2**25, dtype=torch.float32, device=where)  # 1 GiB, 128 MiB
    num_bytes = source.numel() * source.element_size()
    copy = _best_seconds(lambda: target.copy_(source), where)
    read = _best_seconds(lambda: torch.sum(source), where)  # a card may read faster than it copies
    size = 8192 if on_gpu else 1024
    a, b = torch.ones(2, size, size, dtype=kind, device=where)
    product = _best_seconds(lambda: a @ b, where)
    return Ceilings(
        bytes_per_second=max(2 * num_bytes / copy, num_bytes / read), flops_per_second=2 * size**3 / product
    )


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(_NUM_TRIES + 1):  # the first one warms up
        start = perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(perf_counter() - start)
    return min(seconds[1:])
