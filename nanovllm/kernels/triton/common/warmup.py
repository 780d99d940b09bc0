"""Kernel warmup: Triton kernels are compiled in parallel, after a dry run that notes which ones are missing.

Owns both halves. A launch compiles its kernel, so kernels that are met one after the other are compiled one after the
other, on one core, while the others idle. Invariant: a launch that was noted did nothing, so whatever was run around it
is to be run again.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any

import torch
import triton
from triton import knobs

Missing = dict[tuple[str, str], Callable[[], Any]]  # by kernel and specialization: what compiles it

_noted: ContextVar[Missing | None] = ContextVar("missing_kernels", default=None)  # of this thread
_hook_before: Callable[..., bool | None] | None = None


@contextmanager
def missing_kernels() -> Iterator[Missing]:
    """Inside the `with`, a launch from this thread of a kernel that this process has not compiled yet is noted and left
    out. Other threads compile and launch as ever."""
    global _hook_before
    if knobs.runtime.jit_cache_hook is not _note:
        _hook_before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, _note
    missing: Missing = {}
    token = _noted.set(missing)
    try:
        yield missing
    finally:
        _noted.reset(token)


def _note(**launch: Any) -> bool | None:
    """What Triton asks before it compiles; True: leave it to me, and launch nothing."""
    missing = _noted.get()
    if missing is None:
        return None if _hook_before is None else _hook_before(**launch)
    kernel, specialization = launch["fn"], launch["compile"]["specialization_data"]
    missing[f"{kernel.module}.{kernel.name}", launch["key"]] = lambda: kernel.jit_function.preload(specialization)
    return True


def compile_together(missing: Missing, device: torch.device) -> None:
    """Compile what `missing_kernels` noted, or find it in Triton's cache on disk, on all cores; load it on a GPU."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        # In a context of its own: where a kernel does not compile, Triton's mode is not ended in its context.
        kernels = copy_context().run(_compile, missing, threads)
        if device.type == "cuda":
            list(threads.map(partial(_load, torch.cuda.current_device()), kernels))


def _compile(missing: Missing, threads: ThreadPoolExecutor) -> list[Any]:
    with triton.AsyncCompileMode(threads):
        return [compile_kernel() for compile_kernel in missing.values()]


def _load(device_index: int, kernel: Any) -> None:
    """Triton has a C compiler build what launches a kernel, for each kind of parameters anew."""
    torch.cuda.set_device(device_index)  # a thread has one of its own
    kernel.result().run  # noqa: B018 - a property that loads
