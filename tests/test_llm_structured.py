"""Structured outputs through the whole engine, with everything they must get along with."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams, StructuredOutputsParams
from tests.test_llm_outputs import check_nothing_is_left
from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, save_random, save_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 999}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
WORDS = StructuredOutputsParams(regex="([a-f]{2,6} ){2}[g-k]{2,4}")


def form(structured: StructuredOutputsParams, **options: Any) -> SamplingParams:
    return SamplingParams(
        **{"temperature": 1.5, "seed": 3, "max_tokens": 60, "structured_outputs": structured, **options}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random(tmp_path_factory.mktemp("random"), vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", params=[1, 2], ids=["depth1", "depth2"])
def llm(request: pytest.FixtureRequest, folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), device="cpu", dtype="float32", block_size=8, overlap_depth=request.param) as llm:
        yield llm


def text(llm: LLM, params: SamplingParams) -> str:
    (output,) = llm.generate("hi", params, use_tqdm=False)
    assert output.outputs[0].finish_reason == "stop"
    check_nothing_is_left(llm)
    return output.outputs[0].text


class Model:
    """Stands for a pydantic model class, of which one method is all that is used."""

    @staticmethod
    def model_json_schema() -> dict[str, Any]:
        return SCHEMA


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA), Model], ids=["dict", "text", "pydantic"])
def test_json_follows_its_schema(llm: LLM, schema: Any) -> None:
    value = json.loads(text(llm, form(StructuredOutputsParams(json=schema))))
    assert set(value) == {"a", "b"} and isinstance(value["a"], int) and value["b"] in ("x", "y")


def test_choices_regular_expressions_and_grammars_are_followed(llm: LLM) -> None:
    assert text(llm, form(StructuredOutputsParams(choice=["yes", "no", 'say "é"']))) in ("yes", "no", 'say "é"')
    assert re.fullmatch(WORDS.regex or "", text(llm, form(WORDS)))
    for grammar in ('start: "(" start ")" | "x"', 'root ::= "(" root ")" | "x"'):
        assert re.fullmatch(r"\(*x\)*", text(llm, form(StructuredOutputsParams(grammar=grammar), seed=8)))


def test_an_output_ends_by_eos_where_the_form_may_end(llm: LLM) -> None:
    """EOS only where the grammar allows it; a request that ignores EOS goes on as long as anything can follow."""
    ends = StructuredOutputsParams(regex="a{3,40}")
    favoured = form(ends, logit_bias={EOS: 100.0})
    assert text(llm, favoured) == "aaa"
    assert text(llm, form(ends, logit_bias={EOS: 100.0}, ignore_eos=True)) == "a" * 40
    assert text(llm, form(ends, logit_bias={EOS: 100.0}, min_tokens=10)) == "a" * 10
    (output,) = llm.generate("hi", favoured, use_tqdm=False)
    assert output.outputs[0].token_ids == [*b"aaa", EOS] and output.outputs[0].stop_reason is None


def test_the_grammar_has_the_last_word(llm: LLM) -> None:
    """Options that contradict it cannot make it say anything else, or fail."""
    yes = StructuredOutputsParams(choice=["yes"])
    for options in ({"allowed_token_ids": [ord("q")]}, {"bad_words": ["e"]}, {"min_tokens": 20}, {"temperature": 0}):
        assert text(llm, form(yes, **options)) == "yes"


def test_seeded_outputs_are_the_same_in_any_batch(llm: LLM, folder: Path) -> None:
    """Alone, beside others with and without a grammar, after preemptions, in chunks, at any depth."""
    params = [form(WORDS), form(WORDS, seed=9, n=2), form(StructuredOutputsParams(json=SCHEMA)), form(WORDS, n=3)]
    params.append(SamplingParams(temperature=1.0, seed=4, max_tokens=30))
    prompts = ["hi", "a longer one", "hi", "something else", "free"]
    alone = [
        [completion.text for completion in llm.generate(prompt, p, use_tqdm=False)[0].outputs]
        for prompt, p in zip(prompts, params, strict=True)
    ]
    for options in (
        {"num_gpu_blocks_override": 14, "block_size": 8, "max_model_len": 96},
        {"max_num_seqs": 3, "max_num_batched_tokens": 5},
    ):
        for depth in (1, 2, 3):
            with LLM(str(folder), device="cpu", dtype="float32", overlap_depth=depth, **options) as other:
                outputs = other.generate(prompts, params, use_tqdm=False)
                assert [[c.text for c in output.outputs] for output in outputs] == alone
                assert ("block_size" in options) == (other.get_metrics()["num_preemptions"] > 0)
                check_nothing_is_left(other)


def test_stop_strings_and_penalties_work_as_without_a_grammar(llm: LLM) -> None:
    whole = text(llm, form(WORDS))
    assert text(llm, form(WORDS, stop=[" "])) == whole.split(" ")[0]
    varied = StructuredOutputsParams(regex="[a-z]{26}")
    assert len(set(text(llm, form(varied, presence_penalty=2.0, frequency_penalty=2.0, temperature=0)))) > len(
        set(text(llm, form(varied, temperature=0)))
    )


def test_streams_and_aborts_work_as_without_a_grammar(llm: LLM) -> None:
    whole = text(llm, form(WORDS))
    assert "".join(output.outputs[0].text for output in llm.stream("hi", form(WORDS))) == whole
    name = llm.add_request("hi", form(WORDS))
    llm.step()
    llm.step()
    llm.abort_request(name)
    llm.step()
    check_nothing_is_left(llm)


def test_a_bad_form_fails_its_own_request_before_it_is_queued(llm: LLM) -> None:
    bad = form(StructuredOutputsParams(regex="(("))
    with pytest.raises(ValueError, match=r"prompts\[1\]: structured_outputs\.regex cannot be compiled"):
        llm.generate(["a", "b"], [form(WORDS), bad], use_tqdm=False)
    check_nothing_is_left(llm)
    name = llm.add_request("hi", form(WORDS))
    llm.step()
    with pytest.raises(ValueError, match="cannot be compiled"):
        llm.add_request("hi", bad)
    texts = []
    while llm.has_unfinished_requests():
        texts += [(output.request_id, output.outputs[0].text) for output in llm.step()]
    assert texts[-1] == (name, text(llm, form(WORDS)))


def test_without_a_tokenizer_it_is_refused(folder: Path) -> None:
    with (
        LLM(str(folder), device="cpu", dtype="float32", skip_tokenizer_init=True) as llm,
        pytest.raises(ValueError, match=r"prompts\[0\]: structured_outputs need a tokenizer"),
    ):
        llm.generate([[1, 2]], form(WORDS), use_tqdm=False)


def test_an_interrupt_in_mid_output_changes_nothing(llm: LLM) -> None:
    """The grammar begins anew with the tokens that the host has."""
    expected = text(llm, form(WORDS))
    llm.add_request("hi", form(WORDS))
    for _ in range(5):
        llm.step()
    executor = llm._engine.executor
    real = executor.execute

    def interrupted(plan: Any) -> Any:
        executor.execute = real  # type: ignore[method-assign]
        raise KeyboardInterrupt

    executor.execute = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        while True:
            llm.step()
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert outputs[-1].outputs[0].text == expected
