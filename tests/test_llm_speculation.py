"""Speculation returns the tokens of the engine without it, whatever is drafted.

Each test runs the same requests with and without drafts. `tests/test_features_pairwise.py` has it beside every other
feature, `tests/test_llm_deterministic.py` to the bit, `tests/engine/test_scheduler_oracle.py` over random workloads.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import chi2

from nanovllm import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from tests.runner.fake_graphs import fake_graphs
from tests.test_llm_outputs import check_nothing_is_left
from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, random_prompts, save_random, save_tokenizer

PROMPTS = random_prompts([3 + 5 * (i % 7) for i in range(62)], vocab_size=256) + [[7, 8, 9] * 6, [5] * 20]
GREEDY = [SamplingParams(temperature=0, max_tokens=16, ignore_eos=True) for _ in PROMPTS]
SEEDED = [
    SamplingParams(
        **{"temperature": 0.7 + 0.1 * (i % 5), "seed": i, "max_tokens": 16, "ignore_eos": True},
        **[{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.02}, {"presence_penalty": 0.5, "logprobs": 1}][i % 5],
    )
    for i in range(len(PROMPTS))
]


class Adversary:
    """Drafts by what the plain engine returned, in one of the ways in which a proposer may be right or wrong."""

    def __init__(self, way: str, outputs: Sequence[RequestOutput]) -> None:
        self._way = way
        self._rng = random.Random(0)
        self._known = [[*o.prompt_token_ids, *c.token_ids] for o in outputs for c in o.outputs]

    def propose(self, token_ids: list[int], num_tokens: int) -> list[int]:
        length = len(token_ids)
        right = next((k[length : length + num_tokens] for k in self._known if k[:length] == token_ids), [])
        match self._way:
            case "always right":
                return right
            case "always wrong":
                return [(token_id + 1) % 256 for token_id in right]
            case "random":
                return [self._rng.choice([*right, 0, 1, 2]) for _ in range(self._rng.randint(0, num_tokens))]
            case "right, then stop tokens":
                return [*right[:2], *[EOS] * num_tokens]
            case "no tokens":
                return [*right[:1], -1, 10**9]
        raise AssertionError(self._way)


WAYS = ["always right", "always wrong", "random", "right, then stop tokens", "no tokens"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random(tmp_path_factory.mktemp("model"), vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS)
    save_tokenizer(folder)
    return folder


def make_llm(folder: Path, **options: Any) -> LLM:
    defaults = {"device": "cpu", "dtype": "float32", "block_size": 8, "max_num_seqs": 16}
    return LLM(str(folder), **{**defaults, **options})


def drafting(proposer: object, **options: Any) -> dict[str, Any]:
    fields = {"method": "custom_class", "proposer": proposer, "num_speculative_tokens": 4, "adaptive": False}
    return {"speculative_config": {**fields, **options}}


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[LLM]:
    with make_llm(folder) as llm:
        yield llm


def results(outputs: list[RequestOutput]) -> list[Any]:
    return [(c.token_ids, c.text, c.finish_reason, c.stop_reason) for o in outputs for c in o.outputs]


@pytest.mark.parametrize("way", WAYS)
def test_64_prompts_give_the_same_tokens_greedy_and_seeded(folder: Path, plain: LLM, way: str) -> None:
    params = SEEDED if way in ("always right", "random") else GREEDY
    expected = plain.generate(PROMPTS, params, use_tqdm=False)
    overlap_depth = 2 if way == "random" else 1
    with make_llm(folder, **drafting(Adversary(way, expected)), overlap_depth=overlap_depth) as llm:
        assert results(llm.generate(PROMPTS, params, use_tqdm=False)) == results(expected)
        counters = llm.get_metrics()
        check_nothing_is_left(llm)
    drafted, accepted = (counters[f"spec_decode_num_{name}_tokens"] for name in ("draft", "accepted"))
    per_position = [counters[f"spec_decode_num_accepted_tokens_per_pos_{i}"] for i in range(4)]
    assert sum(per_position) == accepted and per_position == sorted(per_position, reverse=True)
    if way == "always right":
        assert accepted == drafted > 0
        assert counters["num_steps"] < 0.5 * 4 * 16, "four batches of 16 tokens each"
    elif way == "always wrong":
        assert accepted == 0 < drafted
    elif way == "random":
        assert 0 < accepted < drafted


@pytest.mark.parametrize("way", ["always right", "random"])
def test_captured_steps_give_the_same_tokens(
    folder: Path, plain: LLM, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Each token of a step is a decode of its own then, and the device counts what was accepted."""
    expected = plain.generate(PROMPTS[:20], SEEDED[:20], use_tqdm=False)
    fake = fake_graphs(monkeypatch)
    options = {"max_num_seqs": 24, "overlap_depth": 2}
    with make_llm(folder, **drafting(Adversary(way, expected)), **options) as llm:
        assert results(llm.generate(PROMPTS[:20], SEEDED[:20], use_tqdm=False)) == results(expected)
        assert llm.get_metrics()["spec_decode_num_accepted_tokens"] > 20
    assert fake.num_decodes > 2 and fake.num_uncaptured == 0


@pytest.mark.parametrize(("method", "options"), [("ngram", {"prompt_lookup_min": 1}), ("suffix", {})])
def test_drafts_from_the_own_tokens_make_a_repetition_short(
    folder: Path, plain: LLM, method: str, options: dict[str, Any]
) -> None:
    prompts = [[7, 8, 9] * 6, [5, 6] * 5, [1, 2, 3, 4]]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logit_bias={7: 60, 8: 60, 9: 60})
    expected = plain.generate(prompts, params, use_tqdm=False)
    config = {"method": method, "num_speculative_tokens": 6, "adaptive": False, **options}
    with make_llm(folder, speculative_config=config) as llm:
        assert results(llm.generate(prompts, params, use_tqdm=False)) == results(expected)
        assert llm.get_metrics()["spec_decode_num_accepted_tokens"] > 20


def test_a_form_forbids_drafts_and_a_stop_string_ends_within_one(folder: Path, plain: LLM) -> None:
    """Tokens that the grammar forbids are cut; what lies behind an end in a draft is dropped, text and all."""
    form = StructuredOutputsParams(regex="[a-f]{3,9} [a-f]{9}")
    params = [
        SamplingParams(temperature=1.0, seed=1, max_tokens=30, structured_outputs=form, logprobs=1),
        SamplingParams(temperature=1.0, seed=2, max_tokens=30, stop=[chr(c) for c in range(97, 110)], logprobs=0),
        SamplingParams(temperature=1.0, seed=3, max_tokens=30, stop_token_ids=list(range(0, 256, 3)), min_tokens=5),
        SamplingParams(temperature=1.0, seed=4, max_tokens=30, n=3, bad_words=["ab", "c"], ignore_eos=True),
    ]
    prompts = ["one", "two", "three", "four"]
    expected = plain.generate(prompts, params, use_tqdm=False)
    for way in ("always right", "random", "always wrong"):
        with make_llm(folder, **drafting(Adversary(way, expected))) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert results(outputs) == results(expected)
            for output, wanted in zip(outputs[:2], expected[:2], strict=True):
                (completion,), (other,) = output.outputs, wanted.outputs
                assert len(completion.logprobs) == len(completion.token_ids)
                assert [set(entry) for entry in completion.logprobs] == [set(entry) for entry in other.logprobs]
                assert completion.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-4)
            check_nothing_is_left(llm)


def test_a_function_that_fails_ends_its_request_behind_the_same_tokens(folder: Path, plain: LLM) -> None:
    def fails_late(token_ids: list[int], logits: Any) -> Any:
        assert len(token_ids) < 9, "enough"
        return logits

    params = [
        SamplingParams(temperature=1.0, seed=1, max_tokens=12, logits_processors=[fails_late]),
        SamplingParams(temperature=1.0, seed=2, max_tokens=12, ignore_eos=True),
    ]
    expected = plain.generate([[1, 2, 3], [4, 5]], params, use_tqdm=False)
    others = plain.generate([[1, 2, 3]], SamplingParams(temperature=1.0, seed=1, max_tokens=12), use_tqdm=False)
    with make_llm(folder, **drafting(Adversary("always right", [*others, *expected]))) as llm:
        outputs = llm.generate([[1, 2, 3], [4, 5]], params, use_tqdm=False)
        assert llm.get_metrics()["spec_decode_num_accepted_tokens"] > 5
    assert results(outputs) == results(expected)
    assert outputs[0].outputs[0].finish_reason == "error" and "enough" in outputs[0].outputs[0].error


def test_streams_get_all_tokens_of_a_step(folder: Path, plain: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = plain.generate("hello", params, use_tqdm=False)
    with make_llm(folder, **drafting(Adversary("always right", expected))) as llm:
        parts = list(llm.stream("hello", params))
    assert [t for part in parts for t in part.outputs[0].token_ids] == expected[0].outputs[0].token_ids
    assert len(parts) < 6


class Broken:
    def propose(self, token_ids: list[int], num_tokens: int) -> list[int]:
        raise OSError("no more guesses")


def test_a_proposer_that_fails_is_asked_no_more(folder: Path, plain: LLM) -> None:
    expected = plain.generate(PROMPTS[:3], GREEDY[:3], use_tqdm=False)
    with make_llm(folder, **drafting(Broken())) as llm:
        with pytest.warns(RuntimeWarning, match="nothing is drafted from here on: OSError: no more guesses"):
            assert results(llm.generate(PROMPTS[:3], GREEDY[:3], use_tqdm=False)) == results(expected)
        assert llm.get_metrics()["spec_decode_num_drafts"] == 0


class Constant:
    def propose(self, token_ids: list[int], num_tokens: int) -> list[int]:
        return [2, 1, 2][:num_tokens]


def test_requests_that_enter_beside_a_draft_take_none_of_the_places_for_states_behind_its_tokens(
    tmp_path: Path,
) -> None:
    """There is room for the drafts of one request; in its step three others enter with a token each, before it."""
    folder = save_random(tmp_path, "Qwen3_5ForCausalLM")
    options = {"skip_tokenizer_init": True, "max_num_seqs": 8, "max_num_batched_tokens": 8}
    prompts, params = [[5, 6, 5, 6, 5, 6, 5, 6], [7], [8], [9]], GREEDY[0]
    with make_llm(folder, **options) as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
    with make_llm(folder, **options, **drafting(Constant(), disable_by_batch_size=1)) as llm:
        assert results(llm.generate(prompts, params, use_tqdm=False)) == results(expected)
        assert llm.get_metrics()["spec_decode_num_drafts"] > 0


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.0001}], ids=["at once", "in turn"])
def test_unseeded_draws_have_the_models_probabilities(tmp_path: Path, options: dict[str, Any]) -> None:
    """Of all 64 continuations of three tokens. The test fails one time in 10,000 for other seeds, if all is right."""
    folder = save_random(tmp_path, vocab_size=4)
    prompt, num = [1, 2, 3], 2000
    with make_llm(folder, skip_tokenizer_init=True, max_num_seqs=64) as llm:

        def probabilities(prompt: list[int]) -> list[float]:
            one = SamplingParams(max_tokens=1, temperature=0, logprobs=4)
            (output,) = llm.generate([prompt], one, use_tqdm=False)
            return [2.718281828459045 ** output.outputs[0].logprobs[0][token].logprob for token in range(4)]

        first = probabilities(prompt)
        second = {a: probabilities([*prompt, a]) for a in range(4)}
        third = {(a, b): probabilities([*prompt, a, b]) for a, b in product(range(4), repeat=2)}
    config = drafting(Constant(), num_speculative_tokens=2)
    with make_llm(folder, skip_tokenizer_init=True, max_num_seqs=64, **config) as llm:
        params = SamplingParams(temperature=1.0, max_tokens=3, **options)
        outputs = llm.generate([prompt] * num, params, use_tqdm=False)
        assert llm.get_metrics()["spec_decode_num_accepted_tokens"] > 100
    counts = Counter(tuple(output.outputs[0].token_ids) for output in outputs)
    statistic, others, rest = 0.0, 0, 0.0
    num_cells = 0
    for a, b, c in product(range(4), repeat=3):
        expected = num * first[a] * second[a][b] * third[a, b][c]
        if expected < 5:
            others, rest = others + counts[a, b, c], rest + expected
            continue
        statistic += (counts[a, b, c] - expected) ** 2 / expected
        num_cells += 1
    if rest > 5:
        statistic, num_cells = statistic + (others - rest) ** 2 / rest, num_cells + 1
    assert chi2.sf(statistic, num_cells - 1) > 1e-4
