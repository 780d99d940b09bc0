"""llama.cpp as a peer: what it is asked for, with a stand-in for its binding."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm_bench import engines, llama_cpp_engine
from nanovllm_bench.llama_cpp_engine import LlamaCpp
from nanovllm_bench.workload import uniform


class Llama:
    """Notes what it is told."""

    def __init__(self, path: str, **options: Any) -> None:
        self.path, self.options = path, options
        self.told: list[Any] = []

    def reset(self) -> None:
        self.told.append("reset")

    def eval(self, token_ids: list[int]) -> None:
        self.told.append(len(token_ids))

    def sample(self, temp: float) -> int:
        return 7

    def close(self) -> None:
        self.told.append("closed")


def test_requests_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama, __version__="1.2"))
    found = {"model.gguf": Path("model.gguf"), "folder": Path("folder")}
    monkeypatch.setattr(llama_cpp_engine, "open_checkpoint", lambda model, **_: SimpleNamespace(path=found[model]))
    engine = LlamaCpp("model.gguf", {"max_model_len": 64})
    assert engine.version == "1.2" and engine._llama.options["n_ctx"] == 64
    assert engine.run(uniform(2, 5, 3)) > 0
    engine.close()
    assert engine._llama.told == ["reset", 5, 1, 1, "reset", 5, 1, 1, "closed"]
    with pytest.raises(ValueError, match=r"--compare llama.cpp needs a GGUF file, and folder is none"):
        LlamaCpp("folder", {})


def test_a_binding_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install llama-cpp-python"):
        engines.check_installed("llama.cpp", None)
