"""Kernels that are missing are noted, left out, and compiled together; without a GPU, so nothing is launched."""

from collections.abc import Iterator
from threading import Thread
from threading import enumerate as enumerate_threads
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton import knobs
from triton.compiler.errors import CompilationError
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from nanovllm.kernels.triton.common.warmup import compile_behind, compile_together, log_late_kernels, missing_kernels
from tests.kernels.test_triton_compiles import MODULES, NoDevice, bf16

pytestmark = pytest.mark.slow


class OneDevice(NoDevice):
    """Device 0, as Triton writes its number down."""

    def get_current_device(self) -> Any:
        return 0


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Names of kernels that were compiled and would have run."""
    launches: list[str] = []
    run = JITFunction.run

    def count(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if run(self, *args, grid=grid, warmup=True, **kwargs) is not None:
            launches.append(self.fn.__name__)

    monkeypatch.setattr(driver, "_active", OneDevice(90))
    monkeypatch.setattr(JITFunction, "run", count)
    for module in MODULES.values():
        for kernel in [value for value in vars(module).values() if isinstance(value, JITFunction)]:
            monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield launches


def step() -> None:
    MODULES["silu_and_mul"].silu_and_mul_triton(bf16(3, 256))
    MODULES["silu_and_mul"].silu_and_mul_triton(bf16(3, 512))
    MODULES["rms_norm"].rms_norm_triton(bf16(3, 128), bf16(128), 1e-6)
    MODULES["silu_and_mul"].silu_and_mul_triton(bf16(5, 256))


NAMES = ["_silu_and_mul_kernel", "_silu_and_mul_kernel", "_rms_norm_kernel", "_silu_and_mul_kernel"]


def test_what_is_missing_is_compiled_and_then_found(launches: list[str]) -> None:
    with missing_kernels() as missing:
        step()
    assert launches == [] and len(missing) == 3  # a kernel for two numbers of rows is one
    compile_together(missing, torch.device("cpu"))
    with missing_kernels() as missing:
        step()
    assert not missing and launches == NAMES


@triton.jit
def _wrong_kernel(ptr):
    tl.store(ptr, tl.arange(0, 3))


def test_a_kernel_that_does_not_compile_leaves_nothing_behind(launches: list[str]) -> None:
    with missing_kernels() as missing:
        _wrong_kernel[(1,)](bf16(4))
    for _ in range(2):
        with pytest.raises(CompilationError):
            compile_together(missing, torch.device("cpu"))
    with missing_kernels() as missing:
        step()
    compile_together(missing, torch.device("cpu"))
    step()
    assert launches == NAMES


def test_outside_and_in_other_threads_kernels_are_compiled_at_once(launches: list[str]) -> None:
    with missing_kernels() as missing:
        other = Thread(target=step)
        other.start()
        other.join()
    assert not missing and launches == NAMES
    MODULES["rms_norm"].rms_norm_triton(bf16(3, 384), bf16(384), 1e-6)
    assert launches == [*NAMES, "_rms_norm_kernel"]


def test_a_hook_that_was_there_is_asked(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("nanovllm.kernels.triton.common.warmup._hook_before", None)
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **launch: asked.append(launch["fn"].name))
    with missing_kernels():
        step()
    assert not asked
    step()
    assert sorted(set(asked)) == ["_rms_norm_kernel", "_silu_and_mul_kernel"] and launches == NAMES


def test_an_error_of_the_compiler_is_raised(launches: list[str]) -> None:
    with missing_kernels() as missing:
        MODULES["silu_and_mul"].silu_and_mul_triton(bf16(3, 256))

    def fail() -> None:
        raise RuntimeError("no such instruction")

    missing["another", ""] = fail
    with pytest.raises(RuntimeError, match="no such instruction"):
        compile_together(missing, torch.device("cpu"))


def test_what_a_launch_waits_for_is_logged_once(
    launches: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", None)
    with missing_kernels():
        MODULES["silu_and_mul"].silu_and_mul_triton(bf16(3, 256))
    log_late_kernels()
    with caplog.at_level("INFO", "nanovllm.late"):
        step()
        step()
    assert launches == NAMES * 2
    logged = [record.getMessage().split()[1] for record in caplog.records]
    assert sorted(logged) == sorted(NAMES[:3]), "two kinds of one kernel, and another"


def test_behind_the_engine_kernels_are_compiled_by_threads_that_end(
    launches: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not compile keeps none of the others from it."""
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", None)
    with missing_kernels() as missing:
        _wrong_kernel[(1,)](bf16(4))
        step()
    log_late_kernels()
    with caplog.at_level("INFO", "nanovllm.late"):
        compile_behind(missing, torch.device("cpu"))
        for thread in enumerate_threads():
            if thread.name == "nanovllm-compile":
                thread.join()
    assert ["was not compiled ahead" in record.getMessage() for record in caplog.records] == [True]
    with missing_kernels() as missing:
        step()
    assert not missing and launches == NAMES
