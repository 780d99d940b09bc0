"""Kernel warmup: Triton kernels are compiled in parallel, after a dry run that notes which ones are missing.

Owns both halves, and a log of what a launch has to wait for once an engine is ready. A launch compiles its kernel, so
kernels that are met one after the other are compiled one after the other, on one core, while the others idle.
Invariant: a launch that was noted did nothing, so whatever was run around it is to be run again.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import partial
from threading import Thread
from time import perf_counter
from typing import Any

import torch
import triton
from triton import knobs

Missing = dict[tuple[str, str], Callable[[], Any]]  # by kernel and specialization: what compiles it

_noted: ContextVar[Missing | None] = ContextVar("missing_kernels", default=None)  # of this thread
_hook_before: Callable[..., bool | None] | None = None
_log = logging.getLogger("nanovllm.late")
_began: dict[Any, float] = {}  # by key of a kernel that is compiled now
_is_behind: ContextVar[bool] = ContextVar("compiles_behind", default=False)  # of a thread of `compile_behind`


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
        _began[launch["key"]] = perf_counter()
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


def compile_behind(missing: Missing, device: torch.device) -> None:
    """The same in threads of their own, on half of the cores, which end with the list or with the process.

    A launch that needs a kernel before its turn compiles it itself.
    """
    tasks = deque(missing.values())
    index = torch.cuda.current_device() if device.type == "cuda" else None

    def work() -> None:
        _is_behind.set(True)
        if index is not None:
            torch.cuda.set_device(index)
        while tasks:
            try:
                kernel = tasks.popleft()()
                if index is not None:
                    kernel.run  # noqa: B018 - a property that loads
            except Exception as error:  # whoever launches it meets it again
                _log.info("a kernel was not compiled ahead: %s", error)

    for _ in range(min(len(tasks), max(1, len(os.sched_getaffinity(0)) // 2))):
        Thread(target=work, name="nanovllm-compile", daemon=True).start()


def _compile(missing: Missing, threads: ThreadPoolExecutor) -> list[Any]:
    with triton.AsyncCompileMode(threads):
        return [compile_kernel() for compile_kernel in missing.values()]


def _load(device_index: int, kernel: Any) -> None:
    """Triton has a C compiler build what launches a kernel, for each kind of parameters anew."""
    torch.cuda.set_device(device_index)  # a thread has one of its own
    kernel.result().run  # noqa: B018 - a property that loads


def log_late_kernels() -> None:
    """From now on, log each kernel that a launch of this process has to wait for, and for how long."""
    if knobs.runtime.jit_post_compile_hook is None:
        knobs.runtime.jit_post_compile_hook = _log_late


def _log_late(**launch: Any) -> None:
    began = _began.pop(launch["key"], None)
    if began is not None and not launch["already_compiled"] and not _is_behind.get():
        _log.info("kernel %s was compiled late, in %.2f s", launch["fn"].name, perf_counter() - began)
