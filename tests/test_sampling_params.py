"""SamplingParams refuses what it cannot do, naming field and value; it never needs torch."""

import dataclasses
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from nanovllm import SamplingParams, StructuredOutputsParams

WRONG_VALUES: list[tuple[str, Any]] = [
    *[("temperature", value) for value in (-0.1, float("nan"), float("inf"), -float("inf"))],
    *[("top_k", value) for value in (-2, -100)],
    *[("top_p", value) for value in (0, 1e-50, -0.5, 1.0001, float("nan"), float("inf"))],
    *[("min_p", value) for value in (-0.001, 1.5, float("nan"))],
    *[("max_tokens", value) for value in (0, -1)],
    *[("n", value) for value in (0, -1, 16_385)],
    ("capture", {"layers": []}),
    *[("min_tokens", value) for value in (-1, 17)],
    *[("seed", value) for value in (2**64, -(2**63) - 1)],
    *[(f"{kind}_penalty", value) for kind in ("presence", "frequency") for value in (-2.01, 2.5, float("nan"))],
    *[("repetition_penalty", value) for value in (0, -1.0, float("nan"), float("inf"), 1e-50, 1e4)],
    *[(name, value) for name in ("logprobs", "prompt_logprobs") for value in (-2, -100)],
    *[("logit_bias", {3: value}) for value in (float("nan"), float("-inf"), 1e39, -1e31, 10**400)],
    ("temperature", 1e39),
    ("min_tokens", 2**40),
    ("allowed_token_ids", []),
    *[("bad_words", words) for words in (["ok", ""], [" "])],
    ("stop", ""),
    ("stop", ["ok", ""]),
]
WRONG_TYPES: list[tuple[str, Any]] = [
    *[("temperature", value) for value in ("0.5", None, True, [0.5], 1j, np.True_, np.ones(1))],
    *[("top_k", value) for value in (1.5, "3", None, True, np.True_, np.float64(3), np.ones(2, dtype=int))],
    *[("top_p", value) for value in ("1", None, False)],
    *[("min_p", value) for value in ("0", None)],
    *[("max_tokens", value) for value in (1.0, "16", True)],
    *[("min_tokens", value) for value in (None, 0.0)],
    *[("seed", value) for value in (0.5, "7", True)],
    *[(f"{kind}_penalty", value) for kind in ("presence", "repetition") for value in ("1", None, True)],
    *[(name, value) for name in ("logprobs", "prompt_logprobs") for value in (1.0, "5", True)],
    *[("logit_bias", value) for value in ([1], {"3": 1.0}, {3: "1"}, {True: 1.0}, {3: None})],
    *[("allowed_token_ids", value) for value in (5, "12", [1.5], [True], {1})],
    *[("bad_words", value) for value in ("word", [1], [None])],
    *[("logits_processors", value) for value in (len, ["name"], [None], [dict])],
    *[("n", value) for value in (1.0, None, "2", True)],
    *[("structured_outputs", value) for value in ({"regex": "a"}, "a", 5)],
    *[("capture", value) for value in ([0], {"layers": 0}, {"layers": [0.5]}, {"layers": None}, {"layer": [0]}, {})],
    *[("ignore_eos", value) for value in (1, None, "yes")],
    *[("include_stop_str_in_output", value) for value in (1, None)],
    *[("spaces_between_special_tokens", value) for value in (0, None)],
    *[("output_kind", value) for value in (1, None, "DELTA")],
    *[("skip_special_tokens", value) for value in (0, None)],
    *[("detokenize", value) for value in (1, None)],
    *[("stop", value) for value in (5, b"end", [1], ["a", None])],
    *[("stop_token_ids", value) for value in (5, "12", [1.5], ["1"], [True], [None])],
]
MISSPELT = {
    "temprature": "temperature",
    "temp": "temperature",
    "max_token": "max_tokens",
    "max_new_tokens": "max_tokens",
    "topk": "top_k",
    "topp": "top_p",
    "minp": "min_p",
    "stop_tokens_ids": "stop_token_ids",
    "ignore_eos_token": "ignore_eos",
    "Seed": "seed",
}


@pytest.mark.parametrize(("field", "value"), WRONG_VALUES)
def test_values_out_of_range_name_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(("field", "value"), WRONG_TYPES)
def test_wrong_types_name_the_field(field: str, value: Any) -> None:
    """No value is silently converted."""
    with pytest.raises(TypeError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("misspelt", MISSPELT)
def test_a_misspelt_option_names_the_nearest_right_one(misspelt: str) -> None:
    with pytest.raises(TypeError, match=f"{misspelt!r}.*{MISSPELT[misspelt]!r}"):
        SamplingParams(**{misspelt: 1})


@pytest.mark.parametrize(
    "unsupported",
    ["best_of", "guided_decoding", "truncate_prompt_tokens"],
)
def test_an_unsupported_option_of_vllm_is_refused(unsupported: str) -> None:
    """Never accepted and ignored; what asks for nothing is no fault."""
    with pytest.raises(TypeError, match=rf"{unsupported}=1 is not supported: "):
        SamplingParams(**{unsupported: 1})
    assert SamplingParams(**{unsupported: None}) == SamplingParams()


def test_positional_arguments_are_refused() -> None:
    with pytest.raises(TypeError):
        SamplingParams(0.5)  # type: ignore[misc]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1e-6},
        {"temperature": 2},
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 1e-3},
        {"logprobs": -1, "prompt_logprobs": 0},
        {
            "logit_bias": {0: -100, 5: 3.5},
            "allowed_token_ids": (1,),
            "bad_words": ("a b",),
            "logits_processors": (max,),
        },
        {"logit_bias": {}, "bad_words": ()},
        {"top_k": -1},
        {"top_k": 10**6},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"min_p": 1},
        {"seed": -(2**63)},
        {"seed": 2**64 - 1},
        {"max_tokens": None, "min_tokens": 100},
        {"max_tokens": 1, "min_tokens": 1},
        {"stop": None, "stop_token_ids": None},
        {"stop": [], "detokenize": False},
    ],
)
def test_values_at_the_bounds_are_accepted(options: dict[str, Any]) -> None:
    params = SamplingParams(**options)
    for name, value in options.items():
        if value is not None and value != []:
            assert getattr(params, name) == value


def test_greedy_is_temperature_zero_or_too_small_to_divide_by() -> None:
    assert [SamplingParams(temperature=t).is_greedy for t in (0, 0.0, 9e-6, 1e-5, 1.0)] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_one_stop_string_and_a_list_mean_the_same() -> None:
    assert SamplingParams(stop="ab") == SamplingParams(stop=["ab"]) == SamplingParams(stop=("ab",))
    assert SamplingParams(stop_token_ids=[3, 4]) == SamplingParams(stop_token_ids=(3, 4))


def test_stop_strings_without_text_are_refused() -> None:
    with pytest.raises(ValueError, match="detokenize"):
        SamplingParams(stop="a", detokenize=False)


def test_an_instance_stays_what_was_checked() -> None:
    stop = ["a"]
    bias = {1: 2.0}
    params = SamplingParams(stop=stop, temperature=0.5, logit_bias=bias)
    stop.append("")
    bias[-1] = 0.0
    assert params.logit_bias == {1: 2.0}
    assert params.stop == ("a",)
    with pytest.raises(ValueError, match="temperature"):
        params.temperature = -1
    assert params.temperature == 0.5
    with pytest.raises(ValueError, match="temperature"):
        dataclasses.replace(params, temperature=-1.0)
    assert dataclasses.replace(params, temperature=1.0).stop == ("a",)


def test_a_field_can_be_assigned_with_the_same_checks() -> None:
    params = SamplingParams(temperature=0.5, max_tokens=4)
    params.stop = "a"
    params.stop_token_ids = [np.int64(3)]
    assert params == SamplingParams(temperature=0.5, max_tokens=4, stop=["a"], stop_token_ids=[3])
    with pytest.raises(ValueError, match="min_tokens"):
        params.min_tokens = 5  # what belongs together is checked together
    with pytest.raises(TypeError, match=r"'temprature'.*'temperature'"):
        params.temprature = 1.0  # type: ignore[attr-defined]
    assert params.min_tokens == 0 and not hasattr(params, "temprature")


def test_a_clone_is_another_object() -> None:
    params = SamplingParams(seed=3, stop="a", logit_bias={1: 2.0})
    clone = params.clone()
    assert clone == params and clone is not params
    clone.max_tokens = 5
    assert params.max_tokens == 16 and clone != params
    assert pickle.loads(pickle.dumps(clone)) == clone


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        ({"max_tokens": np.int64(5)}, {"max_tokens": 5}),
        ({"seed": np.uint64(2**64 - 1)}, {"seed": 2**64 - 1}),
        ({"temperature": np.float32(0.5)}, {"temperature": 0.5}),
        ({"temperature": np.int8(0)}, {"temperature": 0.0}),
        ({"top_p": Fraction(1, 2)}, {"top_p": 0.5}),
        ({"stop_token_ids": list(np.array([3, 4]))}, {"stop_token_ids": (3, 4)}),
        ({"logit_bias": {np.int64(3): np.float16(1)}}, {"logit_bias": {3: 1.0}}),
        ({"capture": {"layers": [np.int64(1)]}}, {"capture": {"layers": (1,)}}),
    ],
)
def test_numbers_of_numpy_are_numbers(options: dict[str, Any], meant: dict[str, Any]) -> None:
    """And plain ones afterwards, which are compared, hashed and sent."""
    params = SamplingParams(**options)
    assert params == SamplingParams(**meant)
    assert repr(params) == repr(SamplingParams(**meant))


@pytest.mark.parametrize("bias", [1e30, -1e30])
@pytest.mark.parametrize("repetition_penalty", [1e-3, 1e3])
def test_what_is_accepted_stays_finite_in_float32(bias: float, repetition_penalty: float) -> None:
    """The bounds belong together: a biased logit, penalised, divided by the smallest temperature that is not greedy."""
    params = SamplingParams(temperature=1.00001e-5, repetition_penalty=repetition_penalty, logit_bias={3: bias})
    assert not params.is_greedy
    largest = np.float32(bias) * np.float32(max(repetition_penalty, 1 / repetition_penalty))
    assert np.isfinite(largest / np.float32(params.temperature))


def test_it_travels_to_other_processes() -> None:
    params = SamplingParams(temperature=0.5, stop=["a"], stop_token_ids=[1], seed=3, logit_bias={4: 1.0})
    assert pickle.loads(pickle.dumps(params)) == params
    assert hash(params) == hash(pickle.loads(pickle.dumps(params)))


def test_several_greedy_outputs_are_refused() -> None:
    """They would all be equal; vLLM refuses them, too."""
    with pytest.raises(ValueError, match=r"n must be 1 .*temperature=0.*got 2"):
        SamplingParams(n=2, temperature=0)


WRONG_FORMS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, "one of json, regex, choice, grammar and json_object, got none"),
    ({"regex": "a", "choice": ["a"]}, ValueError, r"\['regex', 'choice'\]"),
    ({"regexp": "a"}, TypeError, "'regexp'.*'regex'"),
    ({"regex": 5}, TypeError, r"regex.*5"),
    ({"grammar": ["a"]}, TypeError, r"grammar.*'a'"),
    ({"choice": "yes"}, TypeError, r"choice.*'yes'"),
    ({"choice": ["yes", 1]}, TypeError, "choice.*1"),
    ({"choice": []}, ValueError, "choice"),
    ({"choice": ["a", ""]}, ValueError, "choice"),
    ({"json": "{"}, ValueError, "json"),
    ({"json": 5}, TypeError, "json.*5"),
    ({"json": {"enum": [float]}}, TypeError, "json"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG_FORMS, ids=str)
def test_wrong_forms_name_field_and_value(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        StructuredOutputsParams(**options)


def test_forms_are_plain_data() -> None:
    """They travel to other processes, and equal ones are equal: what is compiled once serves both."""
    forms = [StructuredOutputsParams(json={"type": "object"}), StructuredOutputsParams(choice=["a", "b"])]
    for form in forms:
        assert pickle.loads(pickle.dumps(form)) == form and hash(form) == hash(pickle.loads(pickle.dumps(form)))
    assert forms[0] == StructuredOutputsParams(json='{"type": "object"}')
