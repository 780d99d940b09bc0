"""LLM.score: the log-likelihood of options, beside Hugging Face's, with the prefix computed once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from tests.test_beam_search import log_probability
from tests.tiny_models import BOS, VOCAB_WITH_TOKENIZER, load_hugging_face, random_prompts, save_random, save_tokenizer

OPTIONS = random_prompts([1, 5, 12, 2], vocab_size=VOCAB_WITH_TOKENIZER, seed=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random(tmp_path_factory.mktemp("random"), vocab_size=VOCAB_WITH_TOKENIZER)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def hugging_face(folder: Path) -> Any:
    return load_hugging_face(folder)


@pytest.fixture(
    scope="module",
    params=[
        {},
        {"overlap_depth": 2, "max_num_seqs": 2, "max_num_batched_tokens": 9},
        {"enable_prefix_caching": False},
        {"num_gpu_blocks_override": 9, "max_model_len": 72},
    ],
    ids=str,
)
def llm(request: pytest.FixtureRequest, folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), device="cpu", dtype="float32", block_size=8, **request.param) as llm:
        yield llm


@pytest.mark.parametrize("length", [1, 8, 30])
def test_scores_equal_those_of_hugging_face(llm: LLM, hugging_face: Any, length: int) -> None:
    """In chunks, with a prefix cache and without, and where the options preempt each other."""
    (prefix,) = random_prompts([length], vocab_size=VOCAB_WITH_TOKENIZER)
    expected = [log_probability(hugging_face, prefix, option) for option in OPTIONS]
    for _ in range(2):  # the second time everything is cached
        assert llm.score(prefix, OPTIONS) == pytest.approx(expected, abs=1e-4)
    assert llm.score(prefix, OPTIONS[2:3]) == pytest.approx(expected[2:3], abs=1e-4)
    assert llm.score(prefix, []) == []
    assert not llm.has_unfinished_requests()


def test_texts_are_tokenized_as_beginning_and_continuation(llm: LLM, hugging_face: Any) -> None:
    """The prefix gets its BOS, an option none."""
    expected = [log_probability(hugging_face, [BOS, *b"The sky is"], list(option)) for option in (b" blue", b" green")]
    assert llm.score("The sky is", [" blue", " green"]) == pytest.approx(expected, abs=1e-4)
    assert llm.score([BOS, *b"The sky is"], [list(b" blue")]) == pytest.approx(expected[:1], abs=1e-4)


def test_the_prefix_is_computed_once(folder: Path) -> None:
    (prefix,) = random_prompts([64], vocab_size=VOCAB_WITH_TOKENIZER)
    with LLM(str(folder), device="cpu", dtype="float32", block_size=8) as llm:
        llm.score(prefix, OPTIONS)
        # 64 once, and for each option itself and, where it needs the logits of the prefix's last token, its last block
        num_options = sum(len(option) for option in OPTIONS)
        assert llm.get_metrics()["num_tokens_computed"] <= 64 + num_options + 8 * (len(OPTIONS) - 1)


def test_others_go_on_meanwhile(llm: LLM) -> None:
    name = llm.add_request("abc", SamplingParams(temperature=0, max_tokens=5))
    llm.score("x", ["a", "b"])
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert outputs[-1].request_id == name and outputs[-1].finished


@pytest.mark.parametrize(
    ("prefix", "options", "message"),
    [
        ("", ["a"], "prefix is empty"),
        ("a", ["a", ""], r"options\[1\] is empty"),
        ("a", ["a", []], r"options\[1\] is empty"),
        ("a", "ab", "options must be a list"),
        ("a", ["a", 5], r"options\[1\].*5"),
        ("a", ["a", [VOCAB_WITH_TOKENIZER]], r"options\[1\].*vocabulary"),
        ("a", ["b" * 300], r"options\[0\].*tokens"),
    ],
    ids=str,
)
def test_bad_input_is_named_and_nothing_stays_behind(llm: LLM, prefix: str, options: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        llm.score(prefix, options)
    assert not llm.has_unfinished_requests()
