"""The benchmark of several devices, on CPU ranks."""

import json
from pathlib import Path

import pytest

from nanovllm.cli.main import main
from nanovllm_bench.parallel import plan_message_cost
from tests.tiny_models import save_random


@pytest.mark.slow
def test_layouts_are_compared_with_one_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(save_random(tmp_path))
    sizes = ["--tensor-parallel-sizes", "1", "2", "--data-parallel-sizes", "2", "--batch-sizes", "1", "3"]
    lengths = ["--input-len", "6", "--output-len", "4", "--repeat", "2"]
    options = ["--device", "cpu", "--kv-cache-memory-bytes", "1000000"]
    assert main(["bench", "parallel", "--model", model, *sizes, *lengths, *options]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["same_tokens"] == {"tp1 dp1": True, "tp2 dp1": True, "tp1 dp2": True}
    assert len(record["results"]) == 9
    for row in record["results"]:
        assert row["speedup"] > 0 and (row["speedup"] == 1 or row["layout"] != "tp1 dp1")
        assert row["roofline"]["share_of_floor"] > 0 and len(row["seconds"]) == 2
        is_decode = row["num_output_tokens"] > row["num_prompts"]
        assert ("step_ms" in row) == is_decode
        assert ("collectives_ms" in row) == (is_decode and row["tensor_parallel_size"] == 2)
    assert [message["num_ranks"] for message in record["plan_messages"]] == [1, 1, 2, 2]


def test_the_cost_of_a_plan_message() -> None:
    cost = plan_message_cost(num_ranks=2, num_requests=64)
    assert 200 < cost["num_bytes"] < 4000
    assert 0 < cost["send_us"] < cost["round_trip_us"]
