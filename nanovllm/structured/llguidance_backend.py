"""GrammarCompiler: JSON schemas, regular expressions, choices and grammars become constraints, by llguidance.

Owns the translation and the matchers; when a constraint is asked, and what its mask is applied to, is the scheduler's
and the sampler's. llguidance is imported in this folder only. Invariant: what does not compile, or has no first mask,
raises ValueError when it is compiled, before its request is queued.

llguidance walks its parser along a trie of the vocabulary when a mask is wanted, and prepares next to nothing: a schema
compiles in milliseconds. `docs/structured-outputs.md` has the measurements behind the choice.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import tokenizers

from nanovllm.errors import cut
from nanovllm.structured.json_schema import simplified
from nanovllm.structured.patterns import plain_classes
from nanovllm.structured_outputs import StructuredOutputsParams

try:
    import llguidance

    from nanovllm.structured.gbnf import is_gbnf, to_lark
except ImportError as error:
    raise ImportError(
        "structured_outputs need the package llguidance: pip install 'nanovllm[structured]', or pip install llguidance"
    ) from error

# Strings, expressions and comments, in which nothing is a token; and special tokens by name.
_LARK_TOKEN = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|//[^\n]*|<[^<>\s"]+>')
_NUM_KEPT = 64  # compiled grammars that are kept for the next request with the same one


class GrammarCompiler:
    """For one tokenizer (its tokenizers JSON) and a model of vocab_size tokens.

    Making one takes a tenth of a second for each ten thousand tokens. Raises ValueError for a tokenizer whose tokens
    are no strings of bytes, or without any EOS.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        tokenizer_json, self._special_ids = _with_hidden_special_tokens(tokenizer_json)
        num_tokens = tokenizers.Tokenizer.from_str(tokenizer_json).get_vocab_size()
        self._eos_token_ids = [token_id for token_id in eos_token_ids if token_id < num_tokens]
        if not self._eos_token_ids:
            raise ValueError("structured_outputs need a model that has an end-of-sequence token; this one names none")
        try:
            self._tokenizer = llguidance.LLTokenizer(
                tokenizer_json, n_vocab=max(num_tokens, vocab_size), eos_token=self._eos_token_ids
            )
        except Exception as error:  # a plain Exception is what llguidance raises
            raise ValueError(f"structured_outputs cannot be used with this tokenizer: {error}") from error
        self._executor = llguidance.LLExecutor()
        self._ends = np.zeros(-(-self._tokenizer.vocab_size // 32), dtype=np.uint32)  # a mask of the EOS tokens
        for token_id in self._eos_token_ids:
            self._ends[token_id // 32] |= np.uint32(1 << token_id % 32)
        self._known_formats: dict[str, bool] = {}
        self._compile_once = lru_cache(_NUM_KEPT)(self._compile)

    def compile(self, params: StructuredOutputsParams, ignore_eos: bool) -> "GrammarConstraint":
        """A constraint at its beginning. Raises ValueError for what is no valid schema, expression or grammar."""
        matcher = self._compile_once(params).deep_copy()
        return GrammarConstraint(
            matcher, self._executor, self._tokenizer.vocab_size, self._ends if ignore_eos else None
        )

    def _compile(self, params: StructuredOutputsParams) -> Any:
        field, _ = params.kind
        try:
            matcher = llguidance.LLMatcher(self._tokenizer, self._to_grammar(params), log_level=0)
            # Some limits are met with the first mask only.
            first = matcher.deep_copy() if not matcher.is_error() else matcher
            words = np.zeros(-(-self._tokenizer.vocab_size // 32), dtype=np.int32)
            self._executor.unsafe_compute_mask_ptr([(first, 0)], words.ctypes.data, words.nbytes, 1)
        except Exception as error:
            raise ValueError(f"structured_outputs.{field} cannot be compiled: {cut(str(error))}") from error
        if first.is_error():
            raise ValueError(f"structured_outputs.{field} cannot be compiled: {_reason(first)}")
        return matcher

    def _to_grammar(self, params: StructuredOutputsParams) -> str:
        field, value = params.kind
        matcher = llguidance.LLMatcher
        if field == "regex":
            return str(matcher.grammar_from_regex(plain_classes(value)))
        if field == "choice":  # one terminal: as many rules take the square of their number
            return str(matcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(_quoted, value))))
        if field == "grammar":
            return str(matcher.grammar_from_lark(to_lark(value) if is_gbnf(value) else self._with_token_ids(value)))
        schema = {"type": "object"} if field == "json_object" else json.loads(value)
        simple = simplified(schema, self._knows_format, params.disable_additional_properties)
        layout: dict[str, Any] = {"whitespace_flexible": not params.disable_any_whitespace}
        if params.whitespace_pattern is not None:
            layout["whitespace_pattern"] = params.whitespace_pattern
        return str(matcher.grammar_from_json_schema(json.dumps(simple), defaults=layout))

    def _knows_format(self, name: str) -> bool:
        if name not in self._known_formats:
            schema = json.dumps({"type": "string", "format": name})
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
            matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
            self._known_formats[name] = not matcher.is_error()
        return self._known_formats[name]

    def _with_token_ids(self, grammar: str) -> str:
        """A Lark grammar that names special tokens, <|like this|>, with their ids instead: the names are hidden."""

        def replaced(found: re.Match[str]) -> str:
            token_id = self._special_ids.get(found[0])
            return found[0] if token_id is None else f"<[{token_id}]>"

        return _LARK_TOKEN.sub(replaced, grammar)


class GrammarConstraint:
    """What one sequence may still say; a `TokenConstraint`.

    executor: fills masks on all cores. ruled_out: a mask of the EOS tokens of a request that ignores them.
    """

    def __init__(self, matcher: Any, executor: Any, num_tokens: int, ruled_out: np.ndarray | None) -> None:
        self._matcher = matcher
        self._executor = executor
        self._num_words = -(-num_tokens // 32)
        self._ruled_out = ruled_out

    @property
    def error(self) -> str | None:
        """Why the form cannot go on: a limit of the library that it has met."""
        return _reason(self._matcher) if self._matcher.is_error() else None

    def advance(self, token_id: int) -> bool:
        """Take the sequence's next token. Returns whether the form is complete, so that nothing can follow."""
        return bool(
            self._matcher.consume_token(token_id) and self._matcher.is_stopped() and not self._matcher.is_error()
        )

    def restart(self, token_ids: Sequence[int]) -> None:
        """Begin anew, with these tokens taken."""
        self._matcher.reset()
        self._matcher.consume_tokens(list(token_ids))

    def retract(self, num_tokens: int) -> bool:
        """Give back the last tokens taken; whether that could be done."""
        return bool(self._matcher.rollback(num_tokens))

    def bitmasks(self, constraints: Sequence["GrammarConstraint"]) -> np.ndarray:
        """Which tokens may come next in each of these, int32 [n, words] as `sampling/stages/grammar.py` wants them."""
        words = np.zeros((len(constraints), self._num_words), dtype=np.int32)
        matchers = [(constraint._matcher, row) for row, constraint in enumerate(constraints)]
        self._executor.unsafe_compute_mask_ptr(matchers, words.ctypes.data, words.strides[0], len(words))
        at = [row for row, constraint in enumerate(constraints) if constraint._ruled_out is not None]
        if at:
            _rule_out(words.view(np.uint32), np.array(at), constraints[at[0]]._ruled_out)
        return words


def _rule_out(words: np.ndarray, at: np.ndarray, tokens: Any) -> None:
    """Take these tokens out of rows `at` [n] of words, all rows at once; but where nothing else is left."""
    columns = np.flatnonzero(tokens)
    place = np.ix_(at, columns)
    before = words[place]
    words[place] = before & ~tokens[columns]
    is_empty = ~(words if len(at) == len(words) else words[at]).any(axis=1)
    words[np.ix_(at[is_empty], columns)] = before[is_empty]


def _reason(matcher: Any) -> str:
    """Why a matcher cannot go on, without the state of its parser, which the library appends."""
    return cut(" ".join(matcher.get_error().split("<state>")[0].split()))


def _with_hidden_special_tokens(tokenizer_json: str) -> tuple[str, dict[str, int]]:
    """The tokenizer with names for its special tokens that no text holds, and their ids by their real names.

    A form that holds such a name means its letters. By its real name the library would ask for the token itself, whose
    text is left out of the output.
    """
    content = json.loads(tokenizer_json)
    special = {token["content"]: token["id"] for token in content.get("added_tokens", ()) if token["special"]}
    hidden = {name: f"\U000f0000{token_id}\U000f0001" for name, token_id in special.items()}
    for token in content.get("added_tokens", ()):
        token["content"] = hidden.get(token["content"], token["content"])
    _rename(content["model"], hidden)
    return json.dumps(content), special


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """In a model's vocabulary: a dict of names to ids, or a list of pairs."""
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(name, name): token_id for name, token_id in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[names.get(name, name), score] for name, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]


def _quoted(text: str) -> str:
    """A string in Lark's notation."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() or ord(c) > 0xFFFF else f"\\u{ord(c):04x}" for c in quoted)
