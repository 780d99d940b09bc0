"""What fewer bits cost, on tiny models: sums against the log-probabilities that the engine gives."""

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm_bench import quality
from nanovllm_bench.chart import collect
from tests.tiny_models import save_random

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True}
TOKENS = [5, 9, 3, 7, 1, 2, 8, 4, 6, 11, 40, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("quality"), "Qwen3ForCausalLM", intermediate_size=64)


def test_the_plain_model_is_its_own_measure(model: Path) -> None:
    """Its surprise is that of the prompt's log-probabilities; nothing diverges from it."""
    plain: list[torch.Tensor] = []
    with LLM(str(model), **OPTIONS) as llm:
        sums = quality.measure(llm, TOKENS, plain, 0)
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        (output,) = llm.generate([TOKENS], params, use_tqdm=False)
    assert output.prompt_logprobs is not None
    given = [next(iter(entry.values())).logprob for entry in output.prompt_logprobs if entry]
    assert sums.tokens == len(given) == len(TOKENS) - 1
    assert sums.surprise == pytest.approx(-sum(given), rel=1e-5)
    assert sums.divergence == 0 and sums.agreed == sums.tokens
    with LLM(str(model), **OPTIONS, quantization="int4") as llm:
        coarse = quality.measure(llm, TOKENS, plain, 0)
    with LLM(str(model), **OPTIONS, quantization="int8") as llm:
        fine = quality.measure(llm, TOKENS, plain, 0)
    assert 0 < fine.divergence < coarse.divergence and len(plain) == 1


def test_windows() -> None:
    assert quality.cut(range(10), 4, 5) == [[0, 1, 2, 3], [4, 5, 6, 7]] and len(quality.cut(range(10), 4, 1)) == 1
    with pytest.raises(ValueError, match="the text has 3 tokens, fewer than --window 4"):
        quality.cut(range(3), 4, 1)
    with pytest.raises(ValueError, match="--window must be at least 2, got 1"):
        quality.run(Namespace(window=1, windows=1))


def test_the_command(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A table and a JSON line, which a chart reads."""

    class Words:
        def encode(self, text: str) -> list[int]:
            return [3 + len(word) for word in text.split()]

    monkeypatch.setattr(LLM, "get_tokenizer", lambda llm: Words())
    monkeypatch.setattr(quality, "engine_options", lambda args: OPTIONS)
    args = Namespace(kind="quality", model=str(model), forms=["int8"], text=None, window=16, windows=2, output=None)
    args.argv = ["bench", "quality"]
    assert quality.run(args) == 0
    *table, line = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in (table[0], *table[2:])] == ["form", "plain", "int8"]
    record = json.loads(line)
    plain, int8 = record["results"]
    assert plain["mean_kl"] == 0 and plain["agreement"] == 1 and plain["tokens"] == 30
    assert int8["mean_kl"] > 0 and int8["weights_megabytes"] < plain["weights_megabytes"]
    assert math.isclose(int8["perplexity_ratio"], int8["perplexity"] / plain["perplexity"])
    panels = collect([record])
    assert [list(bars) for bars in panels.values()] == [["plain", "int8"], ["plain", "int8"], ["int8"]]
