import pytest
import torch

from nanovllm_bench.sampling import VARIANTS, main, measure


def test_every_variant_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    times = measure(3, 500, 1, torch.device("cpu"))
    assert set(times) == set(VARIANTS) and all(seconds > 0 for seconds in times.values())
    assert main(["--batch-size", "2", "--vocab-size", "300", "--runs", "1", "--device", "cpu"]) == 0
    assert "everything" in capsys.readouterr().out
