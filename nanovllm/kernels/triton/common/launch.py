"""Kernel launches, with programmatic dependent launch (PDL): a kernel starts while the one before it in its stream
still runs (CUDA Programming Guide).

Owns `launch`, the answer whether a kernel is launched this way, the switch that forbids it, and the rules that every
kernel so launched keeps:

1. Each program waits (`gdc_wait`) before it returns. A kernel that did not wait could end before its predecessor, and
   its successor, which waits for it alone, would run beside that predecessor.
2. Before it waits, a program reads weights only: no activation, no cache, nothing of the step. It writes nothing.
3. It triggers (`gdc_launch_dependents`) early if it is short. A trigger lets the next kernel's programs take their
   places; they wait for this kernel's end all the same.
4. Attention of decodes is the exception to rule 2: it reads the step's plan at once, and where decodes are few lengths,
   blocks, and older keys and values as well. All of them were written before the attention of an earlier layer, which
   triggers only after it has waited itself: by then, all that came before that kernel is done and seen by all.
5. Another one: the slot of a single row's adapter is read at once, and by it A and B. What wrote them were copies of
   PyTorch's, which trigger nothing: whatever comes behind one of them in the stream begins when it is done.
6. And a third: the second kernel of a token's experts reads their choice at once. The first one triggers only after it
   has waited, and the choice was written before it.

Invariant: where the answer is no, kernels are compiled without these instructions and launched in turn, and compute the
same bits. A CUDA graph keeps what it was captured with.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from nanovllm.kernels.triton.common.device_limits import compute_capability

# Of the thread (or task) that launches, so that engines may differ; other threads begin with the default.
_is_allowed: ContextVar[bool] = ContextVar("dependent_launch", default=True)


@contextmanager
def dependent_launch(is_allowed: bool) -> Iterator[None]:
    """What this thread launches inside the `with` may be launched this way, or may not."""
    token = _is_allowed.set(is_allowed)
    try:
        yield
    finally:
        _is_allowed.reset(token)


def has_dependent_launch(device: torch.device) -> bool:
    """True from compute capability 9.0 on, unless `dependent_launch(False)` forbids it."""
    return _is_allowed.get() and device.type == "cuda" and compute_capability(device)[0] >= 9


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any) -> None:
    """kernel[grid](*arguments, **constants) for a kernel with a constant PDL, which is told here, as the launch is."""
    pdl = has_dependent_launch(device)
    # What kernel[grid] would call, without the function that it makes for each launch.
    kernel.run(*arguments, grid=grid, warmup=False, PDL=pdl, launch_pdl=pdl, **constants)
