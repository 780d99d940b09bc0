"""What forms mean: texts that they take and texts that they do not, on a tokenizer with a token for each byte."""

import enum
import json
import re
import warnings
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nanovllm import StructuredOutputsParams
from nanovllm.structured.gbnf import is_gbnf
from nanovllm.structured.llguidance_backend import GrammarCompiler
from nanovllm.structured.patterns import plain_classes
from nanovllm.structured_outputs import MAX_FORM_CHARACTERS

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
END, CALL = 256, 257


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>", "<|call|>"])
    return GrammarCompiler(backend.to_str(), 258, [END])


def ids_of(text: str) -> list[int]:
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids: list[int] = backend.encode(text).ids
    return ids


def takes(compiler: GrammarCompiler, text: str | list[int], **form: Any) -> bool:
    """Whether the whole text has the form."""
    token_ids = ids_of(text) if isinstance(text, str) else text
    matcher = compiler.compile(StructuredOutputsParams(**form), False)._matcher
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


# -- GBNF --


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (r'root ::= "\u00e9" "\x41" "\U0001F600"', "éA😀", "eA😀"),
        (r"root ::= [\u00e0-\u00ff\x30]+", "é0", "a"),
        ('root ::= start "b"\nstart ::= "a"', "ab", "a"),
        ("root ::= [a&&b]+", "a&b", "c"),
        ("root ::= [a~~b]+", "a~b", "c"),
        ("root ::= [^a-c]", "d", "b"),
        ("root ::= [^\"\\\\]+", "x/[", 'x"'),
        ("root ::= [/.^$*-]+", "/.^$*-", "a"),
        ('root ::= "a/b" | "c\\"d\\\\" | "\\t\\n"', 'c"d\\', "cd"),
        ('root ::= "\x7f" "\\x00" "a"', "\x7f\0a", "a"),
        ("root ::= . .", "\n😀", "a"),
        ('root ::= (\n  "a" # one\n  | "b"\n)\n  "c"', "bc", "c"),
        ('root ::= "a"\n  | "b"', "b", "ab"),
        ('root ::= ("ab"){2,3} "c"{,1}', "ababc", "abc"),
        ('root ::= my-rule myRule 2nd\nmy-rule ::= "a"\nmyRule ::= "b"\n2nd ::= "c"', "abc", "ab"),
        ('root ::= list\nlist ::= "[" (list ("," list)*)? "]"', "[[],[[]]]", "[[]"),
        ('# a comment: x\n\nroot ::= "a"', "a", "b"),
    ],
)  # fmt: skip
def test_gbnf(compiler: GrammarCompiler, grammar: str, good: str, bad: str) -> None:
    assert takes(compiler, good, grammar=grammar)
    assert not takes(compiler, bad, grammar=grammar)


@settings(deadline=None, max_examples=60)
@given(text=st.text(min_size=1, max_size=6))
def test_any_text_is_a_literal_and_a_class_of_gbnf(compiler: GrammarCompiler, text: str) -> None:
    escaped = "".join(f"\\U{ord(character):08x}" for character in text)
    assert takes(compiler, text, grammar=f'root ::= "{escaped}"')
    assert takes(compiler, text, grammar=f"root ::= [{escaped}]+")


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ('root ::= "a', "line 1 of the grammar is no GBNF from '\"a' on"),
        ('root ::= "a"\n\nroot2 ::= @', "line 3"),
        ("root ::= missing", "rule 'missing' is used and not defined"),
        ('other ::= "a"', "no rule named root"),
        (r'root ::= "\U00110000"', "is no character"),
    ],
)
def test_errors_of_gbnf(compiler: GrammarCompiler, grammar: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        compiler.compile(StructuredOutputsParams(grammar=grammar), False)


@pytest.mark.parametrize(
    ("grammar", "expected"),
    [
        ('start: NAME " ::= " NAME\nNAME: /[a-z]/', False),
        ('// rule ::= body\nstart: "ab"', False),
        ('%llguidance {}\nstart: "ab"', False),
        ('?start.2: "a"', False),
        ('# start: "a"\n\nroot   ::= "a"', True),
        ("root ::= start: x", True),
        ("", False),
    ],
)
def test_which_notation_a_grammar_is_in(grammar: str, expected: bool) -> None:
    """The first statement tells, not what stands in a string or a comment."""
    assert is_gbnf(grammar) == expected


# -- special tokens --


@pytest.mark.parametrize(
    "form",
    [
        {"choice": ["a<|end|>"]},
        {"regex": r"a<\|end\|>"},
        {"grammar": 'start: "a<|end|>"'},
        {"grammar": 'root ::= "a<|end|>"'},
        {"grammar": r"start: /a<\|end\|>/ // <|end|>"},
    ],
    ids=str,
)
def test_a_special_tokens_text_is_its_letters(compiler: GrammarCompiler, form: dict[str, Any]) -> None:
    assert takes(compiler, "a<|end|>", **form)
    constraint = compiler.compile(StructuredOutputsParams(**form), False)
    for token_id in ids_of("a<|end|>"):
        (words,) = constraint.bitmasks([constraint])
        allowed = set(map(int, words.view("uint8").tobytes() and _bits(words)))
        assert allowed == {token_id}
        constraint.advance(token_id)


def _bits(words: Any) -> list[int]:
    return [i for i in range(len(words) * 32) if int(words[i // 32]) >> i % 32 & 1]


def test_a_lark_grammar_may_ask_for_a_special_token(compiler: GrammarCompiler) -> None:
    for grammar in ('start: "a" <|call|> "b"', 'start: "a" <[257]> "b"'):
        assert takes(compiler, [*ids_of("a"), CALL, *ids_of("b")], grammar=grammar)
        assert not takes(compiler, "a<|call|>b", grammar=grammar)
    with pytest.raises(ValueError, match="unknown special token"):
        compiler.compile(StructuredOutputsParams(grammar="start: <|nothing|>"), False)


# -- expressions and choices --


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("[a&&b]", r"[a\&\&b]"),
        ("[a-z~~]", r"[a-z\~\~]"),
        ("[[a]", r"[\[a]"),
        ("[]a]", r"[\]a]"),
        ("[^]a-]", r"[^\]a\-]"),
        ("[+--]", r"[+-\-]"),
        ("[a--z]", "[a-\\-z]"),
        (r"[\w\-\u0041-\x5a]", r"[\w\-\u0041-\x5a]"),
        ("[[:alpha:]_]", "[[:alpha:]_]"),
        (r"\[a&&b\]", r"\[a&&b\]"),
        ("[a", "[a"),
    ],
)
def test_classes_mean_what_they_mean_elsewhere(pattern: str, expected: str) -> None:
    assert plain_classes(pattern) == expected


@settings(deadline=None, max_examples=60)
@given(characters=st.lists(st.sampled_from("ab&~-^[]|\\.é"), min_size=1, max_size=5))
def test_a_class_takes_what_pythons_takes(compiler: GrammarCompiler, characters: list[str]) -> None:
    pattern = "[x" + "".join("\\" + c if c in "\\-]" else c for c in characters) + "]"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Python's own, about set operations it may have one day
        expected = {c for c in "xab&~-^[]|\\.é/" if re.fullmatch(pattern, c)}
    assert {c for c in "xab&~-^[]|\\.é/" if takes(compiler, c, regex=pattern)} == expected


@settings(deadline=None, max_examples=60)
@given(choices=st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=5))
def test_any_texts_are_choices(compiler: GrammarCompiler, choices: list[str]) -> None:
    assert all(takes(compiler, text, choice=choices) for text in choices)
    assert not takes(compiler, "".join(choices) + "more", choice=choices)


def test_many_choices_compile(compiler: GrammarCompiler) -> None:
    choices = [f"city number {number:06d}" for number in range(50_000)]
    assert takes(compiler, choices[31_415], choice=choices)


# -- JSON --


def test_schemas_that_pydantic_writes(compiler: GrammarCompiler) -> None:
    pydantic = pytest.importorskip("pydantic")

    class Color(enum.Enum):
        RED = "red"
        BLUE = "blue"

    class Cat(pydantic.BaseModel):
        kind: Literal["cat"]
        lives: int | None = None

    class Dog(pydantic.BaseModel):
        kind: Literal["dog"]
        secret: pydantic.SecretStr = pydantic.SecretStr("")

    class Owner(pydantic.BaseModel):
        pet: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]
        color: Color
        codes: set[int]
        home: bytes | None = None

    with pytest.warns(UserWarning, match="uniqueItems is not enforced"):
        assert takes(compiler, '{"pet": {"kind": "dog"}, "color": "red", "codes": [1, 2]}', json=Owner)
    assert not takes(compiler, '{"pet": {"kind": "cow"}, "color": "red"}', json=Owner)
    assert not takes(compiler, '{"pet": {"kind": "cat"}, "color": "green"}', json=Owner)


@pytest.mark.parametrize("name", ["password", "binary", "path", "phone", "made-up"])
def test_unknown_formats_are_annotations_and_known_ones_hold(compiler: GrammarCompiler, name: str) -> None:
    assert takes(compiler, '"anything"', json={"type": "string", "format": name})
    assert not takes(compiler, '"anything"', json={"type": "string", "format": "date"})
    assert takes(compiler, '"2026-11-28"', json={"type": "string", "format": "date"})


def test_only_keywords_are_passed_over(compiler: GrammarCompiler) -> None:
    """A property may be called format, and data may look like a schema."""
    schema = {
        "type": "object",
        "properties": {"format": {"type": "string", "format": "made-up"}, "uniqueItems": {"const": {"format": "x"}}},
        "required": ["format", "uniqueItems"],
    }
    assert takes(compiler, '{"format": "a", "uniqueItems": {"format": "x"}}', json=schema)
    assert not takes(compiler, '{"format": "a", "uniqueItems": {}}', json=schema)
    assert takes(compiler, '"a&b"', json={"type": "string", "pattern": "^[a&&b]+$"})


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def test_layout_of_json(compiler: GrammarCompiler) -> None:
    assert takes(compiler, '{ "a" : 1, "b": 2 }', json=OBJECT)
    assert takes(compiler, '{"a":1}', json=OBJECT, disable_any_whitespace=True)
    assert not takes(compiler, '{"a": 1}', json=OBJECT, disable_any_whitespace=True)
    assert takes(compiler, '{"a": 1}', json=OBJECT, whitespace_pattern=" ?")
    assert not takes(compiler, '{"a":  1}', json=OBJECT, whitespace_pattern=" ?")


def test_closed_objects(compiler: GrammarCompiler) -> None:
    assert not takes(compiler, '{"a": 1, "b": 2}', json=OBJECT, disable_additional_properties=True)
    nested = {"type": "array", "items": OBJECT}
    assert not takes(compiler, '[{"a": 1, "b": 2}]', json=nested, disable_additional_properties=True)
    opened = OBJECT | {"additionalProperties": True}
    assert takes(compiler, '{"a": 1, "b": 2}', json=opened, disable_additional_properties=True)


def test_any_object(compiler: GrammarCompiler) -> None:
    assert takes(compiler, '{"a": [1, {}]}', json_object=True)
    assert not takes(compiler, "[1]", json_object=True)
    assert not takes(compiler, '{"a": 1}', json_object=True, disable_any_whitespace=True)


# -- bounds, and what is refused --


@pytest.mark.parametrize(
    ("form", "error", "words"),
    [
        ({"json_object": False}, ValueError, "needs one of json, regex, choice, grammar and json_object, got none"),
        ({"json_object": True, "regex": "a"}, ValueError, "got ['regex', 'json_object']"),
        ({"regex": "a", "whitespace_pattern": " "}, ValueError, "whitespace_pattern is for json and json_object"),
        ({"json": "{", "disable_any_whitespace": True}, ValueError, "json is no JSON"),
        ({"json": "[" * 100_000}, ValueError, "json is no JSON"),
        ({"json_object": True, "disable_any_whitespace": True, "whitespace_pattern": " "}, ValueError, "bans"),
        ({"structural_tag": "{}"}, TypeError, "structural_tag"),
        ({"regex": "a" * (MAX_FORM_CHARACTERS + 1)}, ValueError, "2,000,001 characters, and 2,000,000 is the most"),
        ({"choice": ["a" * 1000] * 2001}, ValueError, "2,001,000 characters"),
    ],
)
def test_what_is_no_form(form: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)) as caught:
        StructuredOutputsParams(**form)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "form",
    [{"regex": "(" + "ab" * 40_000}, {"grammar": "start: " + "a" * 40_000}, {"json": {"type": "x" * 40_000}}],
    ids=["regex", "grammar", "json"],
)
def test_messages_about_long_forms_are_short(compiler: GrammarCompiler, form: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot be compiled") as caught:
        compiler.compile(StructuredOutputsParams(**form), False)
    assert len(str(caught.value)) < 600


def test_a_limit_that_is_met_late_is_an_error_of_the_one_sequence(compiler: GrammarCompiler) -> None:
    """Ambiguity that grows with the text: the library gives up, and the neighbour's mask is what it is alone."""
    alternatives = " | ".join(json.dumps(f"x{number:05d}y") for number in range(2500))
    params = StructuredOutputsParams(grammar=f'start: "xx" (item)\nitem: {alternatives}')
    neighbour = compiler.compile(StructuredOutputsParams(choice=["ab"]), False)
    constraint = compiler.compile(params, False)
    alone = neighbour.bitmasks([neighbour])
    for token_id in ids_of("xxx0"):
        together = constraint.bitmasks([constraint, neighbour])
        assert (together[1] == alone[0]).all()
        if constraint.error is not None:
            break
        constraint.advance(token_id)
    assert constraint.error is not None and len(constraint.error) < 400
