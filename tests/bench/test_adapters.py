"""The bench of adapters on a tiny model."""

import json
from pathlib import Path

import pytest

from nanovllm.cli.main import main
from tests.tiny_models import save_random


def test_rows_with_and_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_random(tmp_path / "model")
    record = tmp_path / "record.jsonl"
    flags = "--device cpu --dtype float32 --num-adapters 2 --batch-sizes 1 3 --rank 4 --output-len 6 --repeat 1"
    assert main(["bench", "adapters", "--model", str(folder), *flags.split(), "-o", str(record)]) == 0
    assert "x without" in capsys.readouterr().out
    rows = json.loads(record.read_text().splitlines()[-1])["results"]
    assert [(row["num_rows"], row["adapters"]) for row in rows] == [
        (1, "off"), (1, "no row's"), (1, "1"), (3, "off"), (3, "no row's"), (3, "2"),
    ]  # fmt: skip
    assert all(row["step_ms"] > 0 and row["times"] > 0 for row in rows)
    assert main(["bench", "adapters", "--rank", "0"]) == 2
