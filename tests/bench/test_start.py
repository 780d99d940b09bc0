"""The parts of a start are those of a real process, and add up; compilers are watched."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from nanovllm.cli.main import main
from nanovllm.kernels.cpu import cpu_kernels
from nanovllm.llm import LLM
from nanovllm_bench import first_use, start_probe
from tests.kernels.cpu.copying_compiler import write_compiler
from tests.tiny_models import save_random, save_tokenizer

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


@pytest.mark.slow
def test_parts_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tokenizer(save_random(tmp_path, vocab_size=272))
    argv = ["bench", "start", "--model", str(tmp_path), "--device", "cpu", "--repeat", "1", "--compilation", "none"]
    assert main([*argv, "--no-enable-prefix-caching"]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    assert "= LLM(...), from call to ready" in "\n".join(table)
    record = json.loads(line)
    assert record["settings"]["enable_prefix_caching"] is False
    (row,) = record["results"]
    for run in (row["cold"], *row["warm"]):
        parts = ("config", "tokenizer", "weights", "memory", "runner", "other")
        assert min(run.values()) >= 0
        assert sum(run[f"{part}_seconds"] for part in parts) == pytest.approx(run["construct_seconds"])
        around = ("python", "import", "construct", "first_token")
        assert sum(run[f"{part}_seconds"] for part in around) == pytest.approx(run["total_seconds"])
        assert run["construct_compile_seconds"] == run["compile_seconds"] == 0, "plain PyTorch"
    assert row["warm_seconds"] == row["warm"][0]["construct_seconds"]


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_a_model_that_is_only_a_config_starts_and_compiles_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler is one that takes no time."""
    assert COMPILER is not None and cpu_kernels.load_cpu_kernels() is not None
    tools = write_compiler(tmp_path / "tools", COMPILER)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    (save_random(tmp_path) / "model.safetensors").unlink()
    argv = ["bench", "start", "--model", str(tmp_path), "--load-format", "dummy", "--skip-tokenizer-init"]
    assert main([*argv, "--device", "cpu", "--repeat", "1"]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    assert sum("compiling kernels in that time" in row for row in table) == 2
    (row,) = json.loads(line)["results"]
    assert row["cold"]["construct_seconds"] > row["cold"]["construct_compile_seconds"] > 0
    assert row["cold"]["compile_seconds"] == row["cold"]["construct_compile_seconds"]
    assert row["warm"][0]["compile_seconds"] == 0


def test_both_compilers_are_watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton's really compiles a kernel, for a GPU that is not here."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu_kernels, "build", lambda *arguments: time.sleep(0.01))
    seconds, names = start_probe._watch_compilers("auto")
    cpu_kernels.build("c++", tmp_path / "library.so")
    assert len(seconds) == 1 and seconds[0] >= 0.01

    @triton.jit
    def kernel(x_ptr):  # type: ignore[no-untyped-def]  # Triton would look the types up
        pass

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        start = time.perf_counter()
        for _ in range(2):  # the second time from Triton's cache
            source = triton.compiler.ASTSource(kernel, {"x_ptr": "*fp32"})
            triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32))
        elapsed = time.perf_counter() - start
    assert len(seconds) == 3
    assert min(seconds[1:]) > 0 and sum(seconds[1:]) < elapsed
    assert names == ["C++ kernels", "kernel", "kernel"]


def test_an_engine_on_a_cpu_watches_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu_kernels, "build", cpu_kernels.build)  # put back behind the test
    start_probe._watch_compilers("cpu")
    assert triton.knobs.compilation.listener is None


def test_kinds_of_steps_are_those_that_fit() -> None:
    few, many = list(first_use.kinds(200, 8)), list(first_use.kinds(40000, 256))
    assert all(len(kind.lens) <= 8 and max(kind.lens) + kind.max_tokens <= 200 for kind in few)
    assert len(few) < len(many) == len({kind.name for kind in many})


def test_each_kind_of_step_is_timed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = first_use.Kind("two", [5, 3], 2, {"logprobs": 1})
    monkeypatch.setattr(first_use, "kinds", lambda *sizes: [kind])
    names = ["before"]
    with LLM(str(save_random(tmp_path)), device="cpu", skip_tokenizer_init=True, kv_cache_memory_bytes=10**7) as llm:
        generate = llm.generate
        monkeypatch.setattr(llm, "generate", lambda *args, **more: (names.append("k"), generate(*args, **more)))
        (row,) = first_use.measure(llm, names)
        assert llm.get_metrics()["num_tokens_sampled"] == 2 * 2 * 2
    assert row["kind"] == "two" and row["kernels"] == ["k"] and min(row["first_seconds"], row["second_seconds"]) > 0


def test_a_start_that_fails_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "start", "--model", str(tmp_path / "nothing"), "--device", "cpu"]) == 2
    assert "the start failed with status 1" in capfd.readouterr().err
