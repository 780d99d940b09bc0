"""Products with quantized weights by themselves, on a tiny model's shape."""

import json
from pathlib import Path

import pytest

from nanovllm.cli.main import main
from tests.tiny_models import save_random


def test_each_form_beside_the_dense_product(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_random(tmp_path / "model", hidden_size=64, intermediate_size=96)
    argv = ["bench", "products", "--model", str(folder), "--device", "cpu", "--dtype", "float32", "--repeat", "2"]
    assert main([*argv, "--rows", "1", "3"]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    results = json.loads(line)["results"]
    assert "GB/s" in table[0] and len(results) == 4 * 2 * 4
    sizes = {row["product"]: (row["inputs"], row["outputs"]) for row in results}
    assert sizes["gate_up"] == (64, 192) and sizes["down"] == (96, 64) and sizes["qkv"][0] == sizes["o"][1] == 64
    errors = {form: max(row["error"] for row in results if row["form"] == form) for form in ("dense", "int8", "int4")}
    assert errors["dense"] < 1e-6 < errors["int8"] < 0.02 < errors["int4"] < 0.2
    assert all(row["us"] > 0 and len(row["seconds"]) == 2 for row in results)
    assert main([*argv, "--rows", "0"]) == 2


def test_the_peer_needs_its_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nanovllm_bench.gemlite_products.find_spec", lambda name: None)
    assert main(["bench", "products", "--model", str(save_random(tmp_path)), "--compare", "gemlite"]) != 0
    assert "pip install gemlite" in capsys.readouterr().err
