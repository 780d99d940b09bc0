"""`nanovllm bench serve` on servers that run, and beside the engine alone."""

import json
from pathlib import Path

import pytest

from nanovllm.cli.main import main
from tests.server.conftest import Running

SIZES = ["--num-prompts", "5", "--input-len", "6", "--output-len", "8", "--repeat", "2", "--num-alone", "2"]


def test_servers_that_run_are_compared(
    server: Running, tooled: Running, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["bench", "serve", "--url", server.url, f"{tooled.url}/v1", *SIZES, "-o", str(tmp_path / "x.jsonl")]
    assert main([*argv, "--request-rate", "200", "--goodput", "ttft:60000", "--idle-connections", "3"]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in table[2:]] == [server.url, f"{tooled.url}/v1"]
    for row in json.loads(line)["results"]:
        assert row["num_failed"] == 0 and row["num_output_tokens"] == 2 * 5 * 8 and len(row["seconds"]) == 2
        assert row["first_token_p50_ms"] <= row["first_token_p99_ms"] and row["gap_p50_ms"] <= row["gap_p99_ms"]
        assert row["share_good"] == 1 and row["goodput"] == pytest.approx(10 / sum(row["seconds"]))
        assert row["alone_first_token_ms"] > 0 and 1 <= row["tokens_per_event"] <= 8
    pytest.importorskip("matplotlib")
    assert main(["bench", "chart", str(tmp_path / "x.jsonl"), "-o", str(tmp_path / "x.svg")]) == 0


def test_conversations_and_requests_that_fail(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "serve", "--url", server.url, "--chat", "--max-concurrency", "2", "--repeat", "1"]
    assert main([*argv, *SIZES[:6], "--num-alone", "1"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert row["num_output_tokens"] == 5 * 8 and row["num_failed"] == 0
    assert main([*argv, "--num-prompts", "2", "--input-len", "21000"]) == 2
    assert "every request failed: status 400: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_of_its_own_beside_the_engine(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    model = server.engine.llm.config.model
    options = ["--device", "cpu", "--max-model-len", "200", "--kv-cache-memory-bytes", "10000000"]
    assert main(["bench", "serve", "--model", model, *SIZES, *options]) == 0
    engine, served = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert (engine["engine"], served["engine"]) == ("LLM", "nanovllm serve")
    assert engine["num_output_tokens"] == served["num_output_tokens"] == 2 * 5 * 8
    assert "server_us_per_token" in served and engine["alone_first_token_ms"] > 0
