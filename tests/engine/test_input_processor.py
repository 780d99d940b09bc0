"""What callers bring: what is refused by its name, and how much work that takes."""

from typing import Any

import numpy as np
import pytest

from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.string_options import MAX_STOP_CHARACTERS, MAX_STOP_STRINGS
from nanovllm.sampling_params import SamplingParams
from nanovllm.scoring import read_continuation

HALF = "good \ud83d"  # as json.loads makes it of text that was cut
LIMIT = 64


class Encoder:
    """A token for each byte, and a count of what it was asked for."""

    def __init__(self) -> None:
        self.num_characters = 0

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.num_characters += len(text)
        return [*text.encode()]


def make_processor(encode: Any) -> InputProcessor:
    return InputProcessor(
        encode=encode,
        special_tokens={"<|end|>": 256, "<|beyond|>": 999},
        vocab_size=300,
        num_layers=2,
        max_model_len=LIMIT,
        num_cache_tokens=1000,
        eos_token_ids=[257],
        seed=0,
    )


def process(prompt: Any, encode: Any = None, **options: Any) -> Any:
    return make_processor(encode or Encoder()).process(prompt, SamplingParams(**options), "prompts[3]", 0)[0]


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        (HALF, {}, r"prompts\[3\] holds U\+D83D at character 5"),
        ({"prompt": HALF}, {}, r"prompts\[3\]\['prompt'\] holds U\+D83D"),
        ("a", {"bad_words": ["a", HALF]}, r"prompts\[3\]: bad_words\[1\] holds U\+D83D"),
        ("", {}, r"prompts\[3\] is empty"),
    ],
)
def test_text_that_is_none_is_named(prompt: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        process(prompt, **options)
    with pytest.raises(ValueError, match=r"options\[2\] holds U\+D83D"):
        read_continuation(make_processor(Encoder()), HALF, "options[2]")


@pytest.mark.parametrize("prompt", [b"abc", bytearray(b"abc"), memoryview(b"abc"), 3, None, {"prompt": b"abc"}])
def test_what_is_no_prompt(prompt: Any) -> None:
    with pytest.raises(TypeError, match=r"prompts\[3\].* must be a string"):
        process(prompt)


def test_arrays_are_prompts() -> None:
    assert process(np.array([1, 2])).token_ids == process(iter([1, 2])).token_ids == [1, 2]


@pytest.mark.parametrize("text", ["word " * 4_000_000, "a" * 5_000_000], ids=["words", "one word"])
def test_a_text_that_is_far_too_long_is_not_tokenized_as_a_whole(text: str) -> None:
    encode = Encoder()
    with pytest.raises(ValueError, match=rf"prompts\[3\] has {len(text):,} characters.*max_model_len is {LIMIT}"):
        process(text, encode)
    assert encode.num_characters < 100_000


def test_a_long_text_of_few_tokens_fits() -> None:
    """Some tokenizers make little of much white space."""

    def encode(text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [*text.strip().encode()]

    assert process(" " * 1_000_000 + "ab", encode).token_ids == [97, 98]


def test_too_many_token_ids_are_not_copied() -> None:
    class Long(list[int]):
        def __iter__(self) -> Any:
            raise AssertionError("its length says enough")

    with pytest.raises(ValueError, match=rf"prompts\[3\] has {LIMIT} tokens; .*max_model_len is {LIMIT}"):
        process(Long([1] * LIMIT))
    with pytest.raises(ValueError, match="max_model_len"):
        process(iter(int, 1))


@pytest.mark.parametrize(
    "stop", [["x"] * (MAX_STOP_STRINGS + 1), ["x" * (MAX_STOP_CHARACTERS + 1)]], ids=["many", "long"]
)
def test_stop_strings_are_bounded(stop: list[str]) -> None:
    with pytest.raises(ValueError, match=r"prompts\[3\]: stop holds .* are the most") as caught:
        process("a", stop=stop)
    assert len(str(caught.value)) < 300


def test_a_stop_string_may_be_a_special_token() -> None:
    """The token, where special tokens have no text; letters, where they have."""
    request = process("a", stop=["<|end|>", "x", "<|beyond|>"])
    assert request.stop_token_ids == {256, 257}
    assert request.stop_reasons == {256: "<|end|>", 257: None}
    request = process("a", stop=["<|end|>"], skip_special_tokens=False, ignore_eos=True)
    assert (request.stop_token_ids, request.stop_reasons) == (frozenset(), {})


def test_messages_about_long_things_are_short() -> None:
    with pytest.raises(TypeError) as caught:
        process({"prompt": ["x" * 100_000]})
    assert len(str(caught.value)) < 300


def test_of_the_sequences_of_a_prompt_the_first_scores_it() -> None:
    params = SamplingParams(n=3, prompt_logprobs=1, capture={"layers": [0]})
    group = make_processor(Encoder()).process("abc", params, "prompt", 0)
    assert [request.scoring is not None for request in group] == [True, False, False]
    assert [request.params.prompt_logprobs for request in group] == [1, None, None]
    assert len({id(request.capture) for request in group}) == 3, "each has states of its own"
