"""The benchmark's output: a table, then one JSON line that holds every run."""

import json
import sys
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import nanovllm
from nanovllm.cli.main import main
from nanovllm.llm import LLM
from nanovllm_bench.earlier_build_worker import run_job
from nanovllm_bench.elsewhere import EarlierBuild
from nanovllm_bench.engines import NanoVLLM
from nanovllm_bench.workload import check_counts, uniform
from tests.tiny_models import save_random

SMALL = [
    "--kv-cache-memory-bytes",
    "10000000",
    "--device",
    "cpu",
    "--repeat",
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
    assert record["command"].startswith("nanovllm bench throughput --model")
    ours = [row for row in record["results"] if row["engine"] == "nanovllm"]
    for row in ours:
        assert 0 < row["host_share"] < 1
        assert row["work"]["num_tokens_sampled"] == 2 * row["num_output_tokens"]
        assert row["work"]["num_tokens_computed"] > 2 * row["num_prompt_tokens"]
        assert row["roofline"]["floor_seconds"] == pytest.approx(
            row["roofline"]["share_of_floor"] * sum(row["seconds"])
        )
    for row in record["results"]:
        assert len(row["seconds"]) == 2
        assert row["slowest"] <= row["output_tokens_per_second"] <= row["fastest"]
        assert ("nanovllm_speedup" in row) == (row["engine"] == "hf")


def test_latency(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "latency", "--model", model, *SMALL]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert row["num_output_tokens"] == 4
    assert len(row["seconds"]) == len(row["first_token_seconds"]) == 2


def test_first_token_alone(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "latency", "--model", model, "--workload", "ttft", *SMALL[:-4]]
    assert main(argv) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert row["workload"] == "ttft" and row["num_prompt_tokens"] == 128 and row["num_output_tokens"] == 1
    assert "step_ms" not in row and row["fastest"] <= row["first_token_ms"] <= row["slowest"]


def test_prefill_counts_prompt_tokens(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "prefill", "--model", model, "--num-prompts", "3", "--input-len", "20", *SMALL[:-4]]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert row["slowest"] <= row["prompt_tokens_per_second"] <= row["fastest"]
    assert row["work"]["num_tokens_computed"] == 2 * 60, "every run starts with an empty prefix cache"


def test_prefix_finds_the_prefix_in_the_cache(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    argv = ["bench", "prefix", "--model", model, "--num-prompts", "3", "--prefix-len", "64", "--output", str(output)]
    for _ in range(2):
        assert main([*argv, *SMALL]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert row["num_prompt_tokens"] == 3 * 70
    assert row["work"]["num_tokens_computed"] == 2 * 3 * (6 + 3), "the prefix is not computed while the clock runs"
    assert [json.loads(line)["benchmark"] for line in output.read_text().splitlines()] == ["prefix", "prefix"]


def test_gaps_of_streams_while_prompts_arrive(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Streams reach the longest length, 48 tokens here, and are replaced."""
    argv = ["bench", "latency", "--model", model, "--arrivals", "--num-streams", "3", "--arrival-len", "40"]
    assert (
        main([*argv, "--max-model-len", "48", "--arrival-ms", "20", "--seconds", "1", "--repeat", "1", *SMALL[:4]]) == 0
    )
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert 0 < row["num_answered"] <= row["num_arrivals"] <= 51
    assert row["gap_p50_ms"] <= row["gap_p99_ms"] <= row["gap_max_ms"] < 1000
    assert row["num_gaps"] > 20


def test_nano_vllm_runs_in_a_python_of_its_own(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nanovllm.py").write_text(
        "class SamplingParams:\n"
        "    def __init__(self, temperature, max_tokens, ignore_eos):\n"
        "        assert temperature > 0 and ignore_eos\n"
        "        self.max_tokens = max_tokens\n"
        "class LLM:\n"
        "    def __init__(self, model, **options): print('loading', model, options)\n"
        "    def generate(self, prompts, params, use_tqdm):\n"
        "        return [{'token_ids': [0] * p.max_tokens} for p in params]\n"
    )
    (tmp_path / "nano_vllm-0.2.dist-info").mkdir()
    (tmp_path / "nano_vllm-0.2.dist-info" / "METADATA").write_text("Name: nano-vllm\nVersion: 0.2\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    argv = ["bench", "throughput", "--model", model, "--num-prompts", "2", "--compare", "nano-vllm", *SMALL]
    assert main([*argv, "--nano-vllm-python", sys.executable]) == 0
    ours, theirs = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert (theirs["engine"], theirs["version"]) == ("nano-vllm", "0.2")
    assert theirs["nanovllm_speedup"] == ours["output_tokens_per_second"] / theirs["output_tokens_per_second"]
    assert main(argv) == 2
    assert "--nano-vllm-python" in capsys.readouterr().err


def test_an_earlier_build_is_measured_in_the_same_call(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Here the earlier build is this checkout itself. A workload is measured in its own way, whatever the kind."""
    checkout = str(Path(__file__).parents[2])
    argv = ["bench", "throughput", "--model", model, "--workload", "ttft", "--before", checkout, *SMALL[:4]]
    assert main([*argv, "--repeat", "1", "--warm-up-len", "1"]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    ours, before = json.loads(line)["results"]
    assert (ours["engine"], before["engine"]) == ("nanovllm", "before") and before["version"] not in ("", "before")
    assert before["nanovllm_speedup"] == pytest.approx(before["first_token_ms"] / ours["first_token_ms"])
    assert "first token ms" in table[0] and "output tok/s" not in table[0]


@pytest.mark.parametrize(
    "more",
    [
        {"n": 2, "temperature": 0.6, "asks": {"logit_bias": {5: 1.0}}},
        {"n": 2, "temperature": 0.6, "streams": True, "asks": {"logprobs": 1, "presence_penalty": 0.5}},
        {"prefix": [1, 2, 3]},
    ],
)
def test_an_earlier_build_is_told_all_that_a_workload_asks_for(model: str, more: dict[str, Any]) -> None:
    workload = replace(uniform(2, 6, 4, mixed=True), **more).variant(0, 50)
    job = json.loads(json.dumps(asdict(workload)))
    with LLM(model, skip_tokenizer_init=True, device="cpu", kv_cache_memory_bytes=10_000_000) as llm:
        seconds, counts = run_job(nanovllm, llm, job)
    check_counts("before", workload, counts)
    assert seconds > 0


def test_an_earlier_build_that_ends_by_itself_is_said(tmp_path: Path) -> None:
    """Before it is asked for anything."""
    (tmp_path / "nanovllm").mkdir()
    (tmp_path / "nanovllm" / "__init__.py").write_text("raise SystemExit(3)")
    earlier = EarlierBuild(tmp_path)
    earlier._process._process.wait()
    with closing(earlier), pytest.raises(RuntimeError, match="before ended with status 3"):
        earlier.load("model", {}, False)


def test_a_folder_that_holds_no_build_is_refused(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["bench", "throughput", "--model", model, "--before", str(tmp_path), *SMALL]) == 2
    assert f"--before {tmp_path} is no checkout of this repository" in capsys.readouterr().err


def test_an_engine_that_is_not_installed_is_refused_before_measuring(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovllm_bench.engines.find_spec", lambda name: None)
    assert main(["bench", "throughput", "--model", model, "--compare", "vllm", *SMALL]) == 2
    assert "pip install vllm" in capsys.readouterr().err


@pytest.mark.parametrize("more", [{"n": 2}, {"streams": True}, {"asks": {"logprobs": 1}}, {"n": 2, "streams": True}])
def test_workloads_that_ask_for_more_are_run(model: str, more: dict[str, Any]) -> None:
    options = {"device": "cpu", "kv_cache_memory_bytes": 10_000_000}
    with closing(NanoVLLM(model, options)) as engine:
        workload = replace(uniform(3, 6, 4, mixed=True), temperature=0.6, **more).variant(0, engine.vocab_size)
        assert engine.run(workload) > 0  # it counts the tokens itself
    assert engine.counters()["num_tokens_sampled"] == workload.num_output_tokens


def test_engines_without_a_feature_are_not_compared(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "throughput", "--model", model, "--workload", "logprobs_256", "offline", "--compare", "hf"]
    assert main(argv) == 2
    assert "--workload logprobs_256 asks for what not every engine offers" in capsys.readouterr().err
