"""Triton's kernels, compiled side by side: first it is noted which ones are missing, then all of them are compiled.

Owns both halves. A launch compiles its kernel, so kernels that are met one after the other are compiled one after the
other, on one core, while the others idle. Invariant: a launch that was noted did nothing, so whatever was run around it
is to be run again.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import get_ident
from typing import Any

Missing = dict[tuple[str, str], Callable[[], object]]  # by kernel and specialization: what compiles it


@contextmanager
def missing_kernels() -> Iterator[Missing]:
    """Inside the `with`, a launch from this thread of a kernel that this process has not compiled yet is noted and left
    out. Other threads compile and launch as ever."""
    from triton import knobs

    missing: Missing = {}
    thread, before = get_ident(), knobs.runtime.jit_cache_hook

    def note(**launch: Any) -> bool | None:
        if get_ident() != thread:
            return before(**launch) if before is not None else None
        kernel, specialization = launch["fn"], launch["compile"]["specialization_data"]
        missing[f"{kernel.module}.{kernel.name}", launch["key"]] = lambda: kernel.jit_function.preload(specialization)
        return True

    knobs.runtime.jit_cache_hook = note
    try:
        yield missing
    finally:
        knobs.runtime.jit_cache_hook = before


def compile_together(missing: Missing) -> None:
    """Compile what `missing_kernels` noted, or load it from Triton's cache on disk, on all cores."""
    import triton

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads, triton.AsyncCompileMode(threads):
        for compile_kernel in missing.values():
            compile_kernel()
