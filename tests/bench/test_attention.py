"""Attention of a prompt by itself, on a tiny model's shape."""

import json
from pathlib import Path

import pytest

from nanovllm.cli.main import main
from tests.tiny_models import edit_json, save_random


def test_prompts_behind_a_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_random(tmp_path / "model")
    argv = ["bench", "attention", "--model", str(folder), "--device", "cpu", "--dtype", "float32", "--repeat", "2"]
    assert main([*argv, "--lengths", "20", "30", "--behind", "10"]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    heads, dim = record["shape"]["num_heads"], record["shape"]["head_dim"]
    assert [row["prompt_len"] for row in record["results"]] == [20, 30] and "TFLOP/s" in table[0]
    for row, pairs in zip(record["results"], [20 * 10 + 210, 30 * 10 + 465], strict=True):
        assert len(row["seconds"]) == 2
        assert row["teraflops_per_second"] == pytest.approx(4 * heads * dim * pairs / row["us"] / 1e6)
    assert main([*argv, "--behind", "-1"]) == 2


def test_device_and_dtype_are_those_that_an_engine_would_choose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_random(tmp_path)
    edit_json(folder / "config.json", dtype="float16")
    argv = ["bench", "attention", "--model", str(folder), "--repeat", "1", "--lengths", "20", "--device"]
    assert main([*argv, "cpu"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]["dtype"] == "float32"
    assert main([*argv, "meta"]) == 2
    assert "device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'meta'" in capsys.readouterr().err
