"""Attention of a prompt by itself, on a tiny model's shape."""

import json
from pathlib import Path

import pytest

from nanovllm.cli.main import main
from tests.tiny_models import save_random


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
