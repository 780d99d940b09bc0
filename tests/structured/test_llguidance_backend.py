"""Constraints by themselves: what they allow, how they end, what does not compile."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nanovllm import StructuredOutputsParams
from nanovllm.model_files.tokenizer_files import load_tokenizer
from nanovllm.structured.llguidance_backend import GrammarCompiler, GrammarConstraint
from tests.tiny_models import EOS, IM_END, VOCAB_WITH_TOKENIZER, save_tokenizer


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return load_tokenizer(str(folder), revision=None).to_json()


@pytest.fixture(scope="module")
def compiler(tokenizer_json: str) -> GrammarCompiler:
    return GrammarCompiler(tokenizer_json, VOCAB_WITH_TOKENIZER, [EOS, IM_END])


def allowed(constraint: GrammarConstraint) -> set[int]:
    (words,) = constraint.bitmasks([constraint])
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def test_each_token_narrows_what_may_follow(compiler: GrammarCompiler) -> None:
    constraint = compiler.compile(StructuredOutputsParams(choice=["yes", "yet", "no"]), False)
    assert allowed(constraint) == {ord("y"), ord("n")}
    assert not constraint.advance(ord("y")) and allowed(constraint) == {ord("e")}
    assert not constraint.advance(ord("e")) and allowed(constraint) == {ord("s"), ord("t")}
    assert constraint.advance(ord("t"))


def test_every_eos_is_allowed_where_the_form_is_complete_and_only_there(compiler: GrammarCompiler) -> None:
    """And none at all for a request that ignores them, as long as something else may follow."""
    params = StructuredOutputsParams(regex="ab*")
    constraint, endless = compiler.compile(params, False), compiler.compile(params, True)
    assert allowed(constraint) == allowed(endless) == {ord("a")}
    assert not constraint.advance(ord("a")) and not endless.advance(ord("a"))
    assert allowed(constraint) == {ord("b"), EOS, IM_END} and allowed(endless) == {ord("b")}


def test_requests_with_the_same_form_do_not_share_their_state(compiler: GrammarCompiler) -> None:
    params = StructuredOutputsParams(choice=["ab", "cd"])
    first, second = compiler.compile(params, False), compiler.compile(params, False)
    first.advance(ord("a"))
    assert allowed(second) == {ord("a"), ord("c")}


def test_masks_of_a_step_are_filled_together(compiler: GrammarCompiler) -> None:
    """Each is what it is alone."""
    params = [StructuredOutputsParams(regex="ab*"), StructuredOutputsParams(choice=["yes", "no"])]
    constraints = [compiler.compile(params[i % 2], i % 3 == 0) for i in range(12)]
    for constraint in constraints[::4]:
        constraint.advance(ord("a"))
    together = constraints[3].bitmasks(constraints)
    for constraint, words in zip(constraints, together, strict=True):
        np.testing.assert_array_equal(words, constraint.bitmasks([constraint])[0])


def test_a_constraint_can_begin_anew(compiler: GrammarCompiler) -> None:
    constraint = compiler.compile(StructuredOutputsParams(choice=["abc", "xyz"]), False)
    for token_id in b"ab":
        constraint.advance(token_id)
    constraint.restart(list(b"x"))
    assert allowed(constraint) == {ord("y")}
    constraint.restart([])
    assert allowed(constraint) == {ord("a"), ord("x")}


def test_a_token_that_is_not_allowed_ends_the_sequence(compiler: GrammarCompiler) -> None:
    constraint = compiler.compile(StructuredOutputsParams(choice=["abc"]), False)
    assert constraint.error is None
    assert not constraint.advance(ord("x"))
    assert constraint.error is not None and "\n" not in constraint.error


def test_a_model_without_an_eos_is_refused(tokenizer_json: str) -> None:
    """A form that may go on, but does not have to, could never end."""
    with pytest.raises(ValueError, match="end-of-sequence"):
        GrammarCompiler(tokenizer_json, VOCAB_WITH_TOKENIZER, [])


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"regex": "(("}, "regex"),
        ({"json": {"type": "nonsense"}}, "json"),
        ({"json": {"type": "object", "properties": 5}}, "json"),
        ({"grammar": "start: missing"}, "grammar"),
        ({"grammar": "root ::= ("}, "grammar"),
    ],
    ids=str,
)
def test_what_does_not_compile_names_its_field(compiler: GrammarCompiler, options: dict, field: str) -> None:
    with pytest.raises(ValueError, match=rf"structured_outputs\.{field} cannot be compiled"):
        compiler.compile(StructuredOutputsParams(**options), False)


def test_without_the_package_the_error_names_the_command(tmp_path: Path) -> None:
    """And nothing but a request with structured_outputs needs it."""
    (tmp_path / "llguidance.py").write_text("raise ImportError('not here')")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import nanovllm.llm\n"
        "try: import nanovllm.structured.llguidance_backend\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "pip install 'nanovllm[structured]'" in done.stdout
