"""What a captured step leaves can be read without being kept, and what it is told is uploaded when it is new."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovllm.runner.graphs.cuda_graphs import Memory, StepGraphs
from tests.gpu_engine import make_llm
from tests.tiny_models import save_random

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def pieces(dtype: torch.dtype, device: str) -> list[Tensor]:
    """Whole, with unused columns as behind a gathered vocabulary, and a single row."""
    whole = torch.randn(6, 40, device=device).to(dtype)
    return [whole, whole[:, :33], whole[2:3], whole.t()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_says_where_a_tensor_lies(dtype: torch.dtype) -> None:
    """NumPy reads the same description under another name."""

    class Array:
        def __init__(self, interface: dict[str, Any]) -> None:
            self.__array_interface__ = interface

    for tensor in pieces(dtype, "cpu"):
        view = np.asarray(Array(Memory(tensor).__cuda_array_interface__))
        assert torch.equal(torch.from_numpy(view).view(dtype), tensor)
        tensor[0, 0] = 7
        assert torch.from_numpy(view).view(dtype)[0, 0] == 7


class Repeated:
    """A layout whose every word is the plan, here a number."""

    def words(self, size: int) -> int:
        return size

    def inputs(self, static: Tensor, size: int) -> Tensor:
        return static

    def fill(self, words: np.ndarray, size: int, plan: Any) -> None:
        words.fill(-1 if plan is None else plan)


def test_only_what_changed_is_uploaded() -> None:
    graphs = StepGraphs[int, Tensor](lambda inputs: (inputs, inputs), Repeated(), 3, 2, torch.device("cpu"), None)  # type: ignore[arg-type]
    for plan, size, is_copied in [(5, 3, True), (5, 3, False), (6, 3, True), (6, 2, True), (6, 2, False), (5, 3, True)]:
        static = graphs._static.fill_(-7)
        uploaded = graphs._upload(size, plan)  # type: ignore[arg-type]
        assert uploaded.data_ptr() == static.data_ptr() and uploaded.tolist() == [plan if is_copied else -7] * size


@pytest.mark.parametrize(
    ("runs_first", "num_missing", "expected"),
    [
        (False, 0, ["captured"]),
        (False, 2, ["captured", "compiled", "compiled", "ran", "captured"]),
        (True, 0, ["ran", "captured"]),
    ],
)
def test_kernels_that_a_capture_finds_missing_are_compiled_before_the_next(
    runs_first: bool, num_missing: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    warmup = pytest.importorskip("nanovllm.kernels.triton.common.warmup")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    done: list[str] = []

    class Graphs(StepGraphs[int, Tensor]):
        def _captured(self, inputs: Tensor) -> Any:
            missing = warmup._noted.get()
            if missing is not None:
                missing |= {("kernel", str(i)): lambda: done.append("compiled") for i in range(num_missing)}
            done.append("captured")
            return "graph"

    def step(inputs: Tensor) -> tuple[Tensor, Tensor]:
        done.append("ran")
        return inputs, inputs

    graphs = Graphs(step, Repeated(), 3, 2, torch.device("cpu"), None, runs_first)
    assert graphs.capture(2, compiles=False) == (expected == ["captured"])
    done.clear()
    assert graphs.capture(3)
    assert done == expected and graphs._graphs[3] == "graph" and (2 in graphs._graphs) == (expected == ["captured"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_view_of_memory_owns_nothing(dtype: torch.dtype) -> None:
    for tensor in pieces(dtype, "cuda"):
        view = torch.as_tensor(Memory(tensor), device=tensor.device).view(dtype)
        assert view.data_ptr() == tensor.data_ptr() and view.device == tensor.device
        assert torch.equal(view, tensor)
    before = torch.cuda.memory_allocated()
    large = torch.zeros(2**20, dtype=dtype, device="cuda")
    view = torch.as_tensor(Memory(large), device=large.device).view(dtype)
    assert torch.cuda.memory_allocated() > before
    del large
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_memory_does_not_grow_with_the_number_of_sizes(tmp_path: Path) -> None:
    """All sizes of decode steps fit beside the largest, which is captured at the start."""
    vocab_size, max_num_seqs = 65536, 256
    folder = save_random(tmp_path, vocab_size=vocab_size, head_dim=64)
    options = {"max_num_seqs": max_num_seqs, "max_model_len": 64, "num_gpu_blocks_override": 300}
    with make_llm(folder, **options) as llm:
        runner = llm._engine.executor._runner  # type: ignore[attr-defined]
        torch.cuda.empty_cache()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        with torch.inference_mode():
            for size in runner._decodes.sizes[:-1]:
                runner._graphs.decode.capture(size)
        torch.cuda.empty_cache()
        logits = 4 * vocab_size * max_num_seqs
        assert torch.cuda.memory_allocated() - allocated < logits // 8
        assert torch.cuda.memory_reserved() - reserved < logits
