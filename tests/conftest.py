"""Tests that need a CUDA device are skipped, with the reason, where there is none. SIGINT is as at a terminal.

Hypothesis takes no time: on a busy machine all of it may pass between two examples. Processes that run tests side by
side have a cache of Triton's kernels each: in a cold one that they shared, kernels got each other's launchers. PyTorch
compiles into a cache for each width of vectors that is asked for: what it keeps does not say for which it was made.
"""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.forked_children import Subprocess

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and "TRITON_CACHE_DIR" not in os.environ:
    os.environ["TRITON_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"nanovllm_tests_triton_{os.getuid()}_{worker}")

if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    cache = Path(tempfile.gettempdir()) / f"nanovllm_tests_inductor_{os.getuid()}_{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--broken-files", default=20, help="how many of each kind tests/weights/test_broken_files.py makes"
    )
    parser.addoption("--kills", default=2, help="how often tests/batch/test_kills.py kills a job")
    parser.addoption("--rows", default=40, help="and how many rows that job has")


def pytest_configure() -> None:
    """A shell starts what it puts into the background with SIGINT ignored; tests that send one would wait for ever."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != "test_triton_compiles.py")  # minutes that no other process can share
    needed = {"gpu": 1, "multigpu": 2}
    marked = [(item, name) for item in items for name in needed if item.get_closest_marker(name)]
    if not marked:
        return
    import torch

    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item, name in marked:
        if num_devices < needed[name]:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed[name]} CUDA device(s), found {num_devices}"))


@pytest.fixture(scope="session", autouse=True)
def forked_children() -> Iterator[None]:
    """See tests/forked_children.py."""
    stand_in = Subprocess()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanovllm.executor.children.subprocess", stand_in)
        yield
    stand_in.server.close()
