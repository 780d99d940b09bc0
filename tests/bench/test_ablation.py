"""Each optimization is compared with itself switched off, in processes of their own."""

import json
from pathlib import Path
from typing import Any

import pytest

from nanovllm.bench import ablation
from nanovllm.bench.ablation import ABLATIONS, MEASURES
from nanovllm.cli.arguments import build_parser
from nanovllm.cli.main import main
from nanovllm.cli.options import engine_options
from nanovllm.config import EngineConfig
from tests.tiny_models import save_random


@pytest.mark.parametrize("case", ABLATIONS, ids=lambda case: case.name)
def test_every_command_can_be_typed_and_differs_by_options_only(case: ablation.Ablation) -> None:
    for name in case.shown_by:
        for command in (MEASURES[name].on_gpu, MEASURES[name].on_cpu):
            on, off = (build_parser().parse_args(["bench", *command, *flags]) for flags in (case.base, case.off))
            assert engine_options(on) != engine_options(off)
            for side in (on, off):
                EngineConfig(model="demo", **engine_options(side))


def test_worth_is_how_many_times_better(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(args: Any, command: tuple[str, ...], known: Any) -> dict[str, Any]:
        is_off = any(command[-len(case.off) :] == case.off for case in ABLATIONS)
        figures = {"output_tokens_per_second": 10, "step_ms": 10, "gap_p99_ms": 10}
        if is_off:
            figures = {"output_tokens_per_second": 5, "step_ms": 30, "gap_p99_ms": 40}
        return {"results": [figures]}

    monkeypatch.setattr(ablation, "_measure", measure)
    assert main(["bench", "ablation", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[-1])["results"]
    expected = {"output tok/s": 2, "output tok/s, shared prefix": 2, "ms a step, batch 1": 3}
    for row in rows:
        assert row["worth"] == expected.get(row["figure"], 4)
    assert {row["optimization"] for row in rows} == {case.name for case in ABLATIONS if not case.on_gpu_only}
    assert any(line.startswith("prefix caching: 2.00 times better; prompts that begin alike") for line in lines)


@pytest.mark.slow
def test_real_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    save_random(tmp_path)
    monkeypatch.setattr(ablation, "ABLATIONS", ABLATIONS[:1])
    argv = ["bench", "ablation", "--model", str(tmp_path), "--device", "cpu", "--repeat", "1", "--compilation", "none"]
    assert main([*argv, "--kv-cache-memory-bytes", "4000000"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    on, off = (run["results"][0]["work"]["num_tokens_computed"] for run in row["runs"])
    assert off - on == 16 * 160, "without the cache every request computes the prefix"


def test_a_run_that_fails_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ablation", "--model", str(tmp_path / "nothing"), "--device", "cpu"]) == 2
    assert "failed; its own message is above" in capfd.readouterr().err
