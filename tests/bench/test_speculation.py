"""The bench of speculation on a model that recites, and so repeats itself."""

import json
from pathlib import Path

import pytest

from nanovllm.cli.main import main
from nanovllm_bench.speculation import tasks
from tests.tiny_models import save_scripted


def test_tasks_fit_into_a_small_model() -> None:
    assert all(len(task) < 900 for task in tasks().values())


def test_a_row_for_each_task_method_and_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_scripted(tmp_path, "abcdefgh", ends=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    flags = "--tasks chat code --methods ngram --num-speculative-tokens 2 4 --max-tokens 60 --repeat 1 --device cpu"
    assert main(["bench", "speculation", "--model", str(folder), *flags.split()]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = record["results"]
    assert [(row["task"], row["method"], row["num_speculative_tokens"]) for row in rows] == [
        (task, *how) for task in ("chat", "code") for how in [("none", 0), ("ngram", 2), ("ngram", 4)]
    ]
    assert all(row["same"] == "yes" for row in rows)
    assert rows[0]["tokens_per_step"] == 1 and rows[2]["counters"]["spec_decode_num_draft_tokens"] >= 0
    with pytest.raises(SystemExit):
        main(["bench", "speculation", "--tasks", "nothing"])
