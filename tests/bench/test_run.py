"""The benchmark's output: a table, then one JSON line that holds every run."""

import json

import pytest

from nanovllm.cli.main import main
from tests.tiny_models import save_random

SMALL = [
    "--kv-cache-memory-bytes",
    "10000000",
    "--device",
    "cpu",
    "--repeats",
    "2",
    "--input-len",
    "6",
    "--output-len",
    "4",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_random(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_throughput_beside_hugging_face(model: str, load_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "throughput", "--model", model, "--batch-sizes", "1", "3", "--mixed", "--compare", "hf", *SMALL]
    assert main([*argv, "--load-format", load_format]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in table[2:]] == ["nanovllm", "hf", "nanovllm", "hf"]
    record = json.loads(line)
    assert record["benchmark"] == "throughput"
    assert record["settings"]["dtype"] == "float32"
    assert {"hardware", "versions", "commit", "date"} <= set(record)
    for row in record["results"]:
        assert len(row["seconds"]) == 2
        assert row["slowest"] <= row["output_tokens_per_second"] <= row["fastest"]
        assert ("nanovllm_speedup" in row) == (row["engine"] == "hf")


def test_latency(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "latency", "--model", model, *SMALL]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert row["num_output_tokens"] == 4
    assert len(row["seconds"]) == len(row["first_token_seconds"]) == 2


def test_an_engine_that_is_not_installed_is_refused_before_measuring(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovllm.bench.run.find_spec", lambda name: None)
    assert main(["bench", "throughput", "--model", model, "--compare", "vllm", *SMALL]) == 2
    assert "pip install vllm" in capsys.readouterr().err
