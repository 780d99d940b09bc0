import pytest

from nanovllm_bench.experts import main


def test_prints_a_row_for_each_batch_size(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--hidden-size", "32", "--intermediate-size", "16", "--num-experts", "4", "--top-k", "2"]
    assert main([*sizes, "--batch-sizes", "1", "6", "--runs", "2", "--repetitions", "2", "--device", "cpu"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["tokens", "experts", "us", "slowest", "floor", "us", "share", "TFLOP/s"]
    assert [row.split()[0] for row in rows] == ["1", "6"]
    assert float(rows[0].split()[1]) == 2.0  # one token uses its top_k, no more
