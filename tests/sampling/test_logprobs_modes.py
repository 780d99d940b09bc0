"""The numbers of each `logprobs_mode`, against plain NumPy on the model's own logits."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm import LLM, SamplingParams
from tests.tiny_models import random_prompts, save_random

VOCAB_SIZE = 128
PROMPT = random_prompts([9])[0]
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "top_p": 0.5},
    "plain": {},
    "warm": {"temperature": 1.7},
    "top_k": {"temperature": 0.7, "top_k": 5},
    "top_p": {"temperature": 1.3, "top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "penalties": {"repetition_penalty": 1.5, "presence_penalty": 0.5, "top_k": 20, "temperature": 0.9},
    "greedy, penalties": {"repetition_penalty": 1.5, "temperature": 0},
    "bias": {"logit_bias": {5: 3.0}, "allowed_token_ids": list(range(0, 100))},
}
MODES = ("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LLM]]:
    folder = str(save_random(tmp_path_factory.mktemp("model")))
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True}
    engines = {mode: LLM(folder, logprobs_mode=mode, **options) for mode in MODES}
    yield engines
    for engine in engines.values():
        engine.close()


def processed(logits: np.ndarray, params: SamplingParams, history: list[int]) -> np.ndarray:
    """As `stages/pipeline.py` and `sampler.py` order it, on one row in float64."""
    x = logits.astype(np.float64)
    if params.allowed_token_ids is not None:
        x[[i for i in range(VOCAB_SIZE) if i not in params.allowed_token_ids]] = -np.inf
    for token_id, bias in (params.logit_bias or {}).items():
        x[token_id] += bias
    seen = np.unique(history)
    x[seen] = np.where(x[seen] > 0, x[seen] / params.repetition_penalty, x[seen] * params.repetition_penalty)
    x[np.unique(history[len(PROMPT) :]).astype(int)] -= params.presence_penalty
    if params.temperature == 0:
        return x
    x /= params.temperature
    if params.min_p:
        x[np.exp(x - x.max()) < params.min_p] = -np.inf
    if params.top_k > 0:
        x[x < np.sort(x)[-params.top_k]] = -np.inf
    if params.top_p < 1:
        order = np.argsort(-x, kind="stable")
        weights = np.exp(x[order] - x.max())
        x[order[weights.cumsum() - weights >= params.top_p * weights.sum()]] = -np.inf
    return x


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def rows_of(output: Any) -> list[np.ndarray]:
    rows = []
    for entry in output.outputs[0].logprobs:
        row = np.full(VOCAB_SIZE, np.nan)
        for token_id, logprob in entry.items():
            row[token_id] = logprob.logprob
        rows.append(row)
    return rows


def test_the_four_modes(engines: dict[str, LLM]) -> None:
    params = [SamplingParams(max_tokens=6, logprobs=-1, seed=3, **options) for options in PARAMS.values()]
    prompts = [PROMPT] * len(params)
    outputs = {mode: llm.generate(prompts, params, use_tqdm=False) for mode, llm in engines.items()}
    for i, (name, one) in enumerate(zip(PARAMS, params, strict=True)):
        token_ids = outputs["raw_logits"][i].outputs[0].token_ids
        assert all(outputs[mode][i].outputs[0].token_ids == token_ids for mode in MODES), name
        by_mode = {mode: rows_of(outputs[mode][i]) for mode in MODES}
        for at, logits in enumerate(by_mode["raw_logits"]):
            history = PROMPT + token_ids[:at]
            expected = processed(logits, one, history)
            np.testing.assert_allclose(by_mode["raw_logprobs"][at], log_softmax(logits), atol=1e-5)
            np.testing.assert_allclose(by_mode["processed_logits"][at], expected, atol=1e-5, err_msg=name)
            np.testing.assert_allclose(by_mode["processed_logprobs"][at], log_softmax(expected), atol=1e-5)
            assert np.isfinite(by_mode["processed_logprobs"][at][token_ids[at]])


def test_few_of_them_their_sum_and_a_prompts(engines: dict[str, LLM]) -> None:
    params = SamplingParams(max_tokens=5, logprobs=2, prompt_logprobs=1, seed=1, temperature=0.5, top_k=3)
    (one,) = engines["processed_logprobs"].generate(PROMPT, params, use_tqdm=False)
    output = one.outputs[0]
    own = [entry[token_id] for token_id, entry in zip(output.token_ids, output.logprobs, strict=True)]
    assert output.cumulative_logprob == pytest.approx(sum(logprob.logprob for logprob in own))
    for entry in output.logprobs:
        assert 2 <= len(entry) <= 3 and sum(np.exp(logprob.logprob) for logprob in entry.values()) <= 1 + 1e-6
        assert [logprob.rank for logprob in entry.values()][1:] == [1, 2][-len(entry) + 1 :] or len(entry) == 2
    (raw,) = engines["raw_logprobs"].generate(PROMPT, params, use_tqdm=False)
    assert [None, *map(dict, one.prompt_logprobs[1:])] == [None, *map(dict, raw.prompt_logprobs[1:])]
    assert raw.outputs[0].cumulative_logprob < output.cumulative_logprob


def test_drafts_have_the_numbers_of_plain_decoding(engines: dict[str, LLM], tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=30, logprobs=1, temperature=0, repetition_penalty=1.05)
    (plain,) = engines["processed_logprobs"].generate(PROMPT, params, use_tqdm=False)
    folder = engines["raw_logits"].config.model
    drafting = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    with LLM(folder, device="cpu", dtype="float32", skip_tokenizer_init=True, speculative_config=drafting,
             logprobs_mode="processed_logprobs") as llm:  # fmt: skip
        (drafted,) = llm.generate(PROMPT, params, use_tqdm=False)
    assert drafted.outputs[0].token_ids == plain.outputs[0].token_ids
    assert drafted.outputs[0].cumulative_logprob == pytest.approx(plain.outputs[0].cumulative_logprob, abs=1e-4)
