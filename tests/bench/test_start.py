"""The parts of a start are those of a real process, and add up."""

import json
from pathlib import Path

import pytest

from nanovllm.cli.main import main
from tests.tiny_models import save_random, save_tokenizer


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
    assert row["warm_seconds"] == row["warm"][0]["construct_seconds"]


def test_a_start_that_fails_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "start", "--model", str(tmp_path / "nothing"), "--device", "cpu"]) == 2
    assert "the start failed with status 1" in capfd.readouterr().err
