"""Each optimization is compared with itself switched off, in processes of their own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nanovllm.cli.arguments import build_parser
from nanovllm.cli.main import main
from nanovllm.cli.options import engine_options
from nanovllm.config import EngineConfig
from nanovllm_bench import ablation
from nanovllm_bench.ablation import ABLATIONS, MEASURES
from tests.tiny_models import save_random


@pytest.mark.parametrize("case", ABLATIONS, ids=lambda case: case.name)
def test_every_command_can_be_typed_and_differs_by_options_only(case: ablation.Ablation) -> None:
    for name in case.shown_by:
        for on_gpu, command in ((True, MEASURES[name].on_gpu), (False, MEASURES[name].on_cpu)):
            on, off = (build_parser().parse_args(["bench", *command, *flags]) for flags in case.sides(on_gpu))
            assert engine_options(on) != engine_options(off)
            for side in (on, off):
                EngineConfig(model="demo", **engine_options(side))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands that would have run. With every optimization 10, without it 5 tok/s, 30 and 40 ms."""
    commands: list[tuple[str, ...]] = []

    def measure(args: Any, command: tuple[str, ...], known: Any) -> dict[str, Any]:
        commands.append(command)
        figures = {"output_tokens_per_second": 10, "step_ms": 10, "gap_p99_ms": 10}
        if any(command[-len(case.off) :] == case.off for case in ABLATIONS):
            figures = {"output_tokens_per_second": 5, "step_ms": 30, "gap_p99_ms": 40}
        return {"results": [figures]}

    monkeypatch.setattr(ablation, "_measure", measure)
    return commands


def rows_of(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[list[dict[str, Any]], Sequence[str]]:
    assert main(["bench", "ablation", *argv]) == 0
    lines = capsys.readouterr().out.splitlines()
    return json.loads(lines[-1])["results"], lines


def test_figures_are_said_at_once(measured: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is cut short has said what it found."""
    assert main(["bench", "ablation", "--device", "cpu", "--only", "prefix"]) == 0
    said = "prefix caching: 2.00 times better (output tok/s, shared prefix: 10 with it, 5 without)"
    assert capsys.readouterr().err.splitlines() == [said]


def test_worth_is_how_many_times_better(measured: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows, lines = rows_of(capsys, "--device", "cpu")
    expected = {"output tok/s": 2, "output tok/s, shared prefix": 2, "ms a step, batch 1": 3}
    for row in rows:
        # Both sides of this one are another one's without.
        assert row["worth"] == (1 if row["optimization"] == "torch.compile" else expected.get(row["figure"], 4))
    names = {"prefix caching", "fused kernels", "fused kernels, against torch.compile", "torch.compile"}
    assert {row["optimization"] for row in rows} == {*names, "chunked prefill"}
    assert any(line.startswith("prefix caching: 2.00 times better; prompts that begin alike") for line in lines)


@pytest.mark.parametrize(("capability", "has_dependent_launch"), [((9, 0), True), ((8, 9), False)])
def test_a_gpu_shows_what_it_has(
    measured: list[tuple[str, ...]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    has_dependent_launch: bool,
) -> None:
    monkeypatch.setattr("nanovllm.kernels.triton.common.launch.compute_capability", lambda device: capability)
    rows, _ = rows_of(capsys, "--device", "cuda")
    names = {case.name for case in ABLATIONS if has_dependent_launch or case.name != "dependent launch"}
    assert {row["optimization"] for row in rows} == names
    budgets = {command[i + 1] for command in measured for i, flag in enumerate(command) if "batched" in flag}
    assert budgets == {"512"}


def test_only_some_by_name_or_part_of_it(
    measured: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovllm.kernels.triton.common.launch.compute_capability", lambda device: (9, 0))
    rows, _ = rows_of(capsys, "--device", "cuda", "--only", "dependent launch", "cuda")
    assert {row["optimization"] for row in rows} == {"dependent launch", "CUDA graphs"}
    assert len(measured) == 2 * len(rows)


@pytest.mark.parametrize(
    ("name", "message"),
    [("graph paper", "'prefix caching', 'CUDA graphs'"), ("overlap", "cpu has nothing of the kind")],
)
def test_a_name_that_means_nothing_here_is_an_error(
    measured: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    assert main(["bench", "ablation", "--device", "cpu", "--only", name]) == 2
    assert message in capsys.readouterr().err
    assert not measured


@pytest.mark.slow
def test_real_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model that is a config.json and nothing else."""
    (save_random(tmp_path) / "model.safetensors").unlink()
    argv = ["bench", "ablation", "--model", str(tmp_path), "--load-format", "dummy", "--only", "prefix caching"]
    argv += ["--device", "cpu", "--repeat", "1", "--compilation", "none", "--kv-cache-memory-bytes", "4000000"]
    assert main(argv) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    on, off = (run["results"][0]["work"]["num_tokens_computed"] for run in row["runs"])
    assert off - on == 16 * 160, "without the cache every request computes the prefix"


def test_a_run_that_fails_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ablation", "--model", str(tmp_path / "nothing"), "--device", "cpu"]) == 2
    assert "failed; its own message is above" in capfd.readouterr().err
