"""A chart says what its files say."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nanovllm.cli.main import main
from nanovllm_bench.chart import Bar, Panel, collect, read_records

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def record(kind: str, **row: Any) -> dict[str, Any]:
    return {"benchmark": kind, "model": "m", "results": [{"engine": "nanovllm"} | row]}


def test_each_kind_of_result_has_its_figure() -> None:
    panels = collect(
        [
            record("throughput", workload="offline", output_tokens_per_second=5.0, slowest=4.0, fastest=6.0),
            record("throughput", workload="prefill", num_prompt_tokens=100, seconds=[1.0, 4.0, 2.0]),
            record("latency", workload="1 x 128+512", step_ms=0.5, first_token_ms=9.0, num_prompts=1),
            record("latency", workload="1 x 128+512", step_ms=0.75, first_token_ms=9.5, num_prompts=1),
            record("start", workload="start", cold_seconds=20.0),
            {
                "benchmark": "latency",
                "model": "m",
                "results": [{"engine": "x", "workload": "decode_1", "step_ms": 2.0}],
            },
        ]
    )
    assert panels == {
        Panel("m", "offline, output tok/s"): {"nanovllm": Bar(5.0, (4.0, 6.0))},
        Panel("m", "prefill, prompt tok/s"): {"nanovllm": Bar(50.0, (25.0, 100.0))},
        Panel("m", "first token, ms (less is better)"): {"nanovllm": Bar(9.5, None)},
        Panel("m", "decode, batch 1, ms a step (less is better)"): {"nanovllm": Bar(0.75, None), "x": Bar(2.0, None)},
        Panel("m", "start, nothing cached, s (less is better)"): {"nanovllm": Bar(20.0, None)},
    }


def test_layouts_of_devices_stand_beside_each_other() -> None:
    steps = [
        record("parallel", workload="decode_1", step_ms=ms, layout=name)
        for name, ms in (("tp1 dp1", 5.0), ("tp2 dp1", 3.0))
    ]
    rate = {"workload": "offline", "output_tokens_per_second": 9.0, "layout": "tp2 dp1"}
    assert collect([*steps, record("parallel", **rate)]) == {
        Panel("m", "decode, batch 1, ms a step (less is better)"): {
            "tp1 dp1": Bar(5.0, None),
            "tp2 dp1": Bar(3.0, None),
        },
        Panel("m", "offline, output tok/s"): {"tp2 dp1": Bar(9.0, None)},
    }


def test_the_recorded_results_can_all_be_read() -> None:
    files = sorted(BENCHMARKS.glob("*.jsonl"))
    assert len(files) >= 3
    for file in files:
        panels = collect(read_records([str(file)]))
        assert panels and all(bar.value > 0 for bars in panels.values() for bar in bars.values()), file


@pytest.mark.parametrize(("suffix", "begins"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_a_chart_is_drawn(suffix: str, begins: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / f"chart.{suffix}"
    files = [str(BENCHMARKS / name) for name in ("h200.jsonl", "h200_peers.jsonl")]
    assert main(["bench", "chart", *files, "--compared-only", "-o", str(output)]) == 0
    assert output.read_bytes().startswith(begins)
    assert capsys.readouterr().out == f"{output}\n"


def test_what_is_missing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(record("throughput", workload="offline", output_tokens_per_second=5.0)) + "\n")

    def message(*argv: str) -> str:
        assert main(["bench", "chart", str(file), *argv]) == 2
        return capsys.readouterr().err

    assert "must end in .svg or .png" in message("-o", "chart.pdf")
    assert "nothing to draw" in message("-o", "chart.svg", "--compared-only")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'nanovllm[bench]'" in message("-o", "chart.svg")
    file.write_text("no JSON\n")
    assert "line 1, is not JSON" in message("-o", "chart.svg")
    file.write_text("{}\n")
    assert "is not a result of nanovllm bench" in message("-o", "chart.svg")
