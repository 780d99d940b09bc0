"""Beam search beside Hugging Face's, beside all sequences there are, and beside a slow one of its own rules."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, BeamSearchParams
from tests.tiny_models import EOS, hugging_face_logits, load_hugging_face, random_prompts, save_random, save_scripted

PROMPTS = random_prompts([5, 1, 19], vocab_size=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve tokens, 3 and 7 of which end a sequence."""
    return save_random(tmp_path_factory.mktemp("random"), vocab_size=12, eos_token_id=[3, 7])


@pytest.fixture(scope="module")
def hugging_face(folder: Path) -> Any:
    return load_hugging_face(folder)


@pytest.fixture(scope="module", params=[{}, {"overlap_depth": 2, "max_num_seqs": 4}], ids=str)
def llm(request: pytest.FixtureRequest, folder: Path) -> Iterator[LLM]:
    options = {"block_size": 8, **request.param}
    with LLM(str(folder), device="cpu", dtype="float32", skip_tokenizer_init=True, **options) as llm:
        yield llm


def log_probability(hugging_face: Any, prompt: list[int], output: list[int]) -> float:
    logits = hugging_face_logits(hugging_face, [*prompt, *output])[len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(output)), output].sum().item()


@pytest.mark.parametrize("beam_width", [1, 2, 5])
def test_without_eos_it_finds_what_hugging_face_finds(llm: LLM, hugging_face: Any, beam_width: int) -> None:
    params = BeamSearchParams(beam_width=beam_width, max_tokens=6, ignore_eos=True)
    for prompt, found in zip(PROMPTS, llm.beam_search(PROMPTS, params), strict=True):
        expected = hugging_face.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            num_beams=beam_width,
            num_return_sequences=beam_width,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert [sequence.tokens for sequence in found.sequences] == expected.tolist()
        for sequence in found.sequences:
            assert sequence.num_prompt_tokens == len(prompt) and sequence.finish_reason == "length"
            expected_sum = log_probability(hugging_face, prompt, sequence.tokens[len(prompt) :])
            assert sequence.cum_logprob == pytest.approx(expected_sum, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
def test_with_all_beams_it_finds_the_best_of_all_sequences(
    llm: LLM, hugging_face: Any, length_penalty: float, temperature: float
) -> None:
    """Each EOS ends a sequence; a width that drops nothing makes the search exhaustive."""
    prompt, width, max_tokens = PROMPTS[0], 12**2, 3
    params = BeamSearchParams(
        beam_width=width, max_tokens=max_tokens, length_penalty=length_penalty, temperature=temperature
    )
    (found,) = llm.beam_search(prompt, params)
    best = {}
    running: dict[tuple[int, ...], float] = {(): 0.0}
    for length in range(1, max_tokens + 1):
        extended = {}
        for output, total in running.items():
            logits = hugging_face_logits(hugging_face, prompt + list(output))[-1] / (temperature or 1.0)
            for token_id, logprob in enumerate(logits.log_softmax(-1).tolist()):
                has_ended = token_id in (3, 7)
                longer = (*output, token_id)
                if has_ended or length == max_tokens:
                    best[longer] = (total + logprob) / (len(prompt) + length - has_ended) ** length_penalty
                else:
                    extended[longer] = total + logprob
        running = extended
    expected = sorted(best, key=lambda output: -best[output])[:20]
    got = [tuple(sequence.tokens[len(prompt) :]) for sequence in found.sequences[:20]]
    assert [best[output] for output in got] == pytest.approx([best[output] for output in expected], abs=1e-5)
    assert {sequence.finish_reason for sequence in found.sequences} == {"stop", "length"}
    for sequence in found.sequences:
        assert (sequence.tokens[-1] in (3, 7)) == (sequence.finish_reason == "stop") or len(sequence.tokens) == 8


def test_the_text_of_a_sequence_is_its_output(tmp_path: Path) -> None:
    folder = save_scripted(tmp_path, "abc", ends=True)
    with LLM(str(folder), device="cpu", dtype="float32") as llm:
        (found,) = llm.beam_search("x", BeamSearchParams(beam_width=2, max_tokens=6))
    assert found.sequences[0].text == "abc" and found.sequences[0].tokens[-1] == EOS


@pytest.mark.parametrize("prompts", [[[1], []], [[1], [12]], [[1], [1] * 250]])
def test_bad_prompts_are_named_and_nothing_stays_behind(llm: LLM, prompts: Any) -> None:
    with pytest.raises(ValueError, match=r"prompts\[1\]"):
        llm.beam_search(prompts, BeamSearchParams(beam_width=2, max_tokens=10))
    with pytest.raises(TypeError, match="params"):
        llm.beam_search([[1]], {"beam_width": 2})  # type: ignore[arg-type]
    assert not llm.has_unfinished_requests()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beam_width": 0}, ValueError, r"beam_width must be in \[1, 1024\], got 0"),
        ({"beam_width": 1025}, ValueError, r"beam_width must be in \[1, 1024\], got 1025"),
        ({"length_penalty": -51.0}, ValueError, r"length_penalty must be in \[-50, 50\], got -51"),
        ({"beam_width": 2.0}, TypeError, "beam_width.*2.0"),
        ({"max_tokens": 0}, ValueError, "max_tokens"),
        ({"max_tokens": None}, TypeError, "max_tokens"),
        ({"temperature": -1}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"length_penalty": "1"}, TypeError, "length_penalty"),
        ({"ignore_eos": 1}, TypeError, "ignore_eos"),
        ({"beam_with": 2}, TypeError, "'beam_with'.*'beam_width'"),
    ],
    ids=str,
)
def test_wrong_parameters_name_field_and_value(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 3, **options})
