"""GrammarCompiler: JSON schemas, regular expressions, choices and grammars become constraints, by llguidance.

Owns the translation and the matchers; when a constraint is asked, and what its mask is applied to, is the scheduler's
and the sampler's. llguidance is imported here only. Invariant: what does not compile raises ValueError when it is
compiled, before its request is queued.

llguidance walks its parser along a trie of the vocabulary when a mask is wanted, and prepares next to nothing: a schema
compiles in milliseconds. `docs/structured-outputs.md` has the measurements behind the choice.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import tokenizers

from nanovllm.errors import cut
from nanovllm.structured_outputs import StructuredOutputsParams

try:
    import llguidance
    from llguidance.gbnf_to_lark import gbnf_to_lark
except ImportError as error:
    raise ImportError(
        "structured_outputs need the package llguidance: pip install 'nanovllm[structured]', or pip install llguidance"
    ) from error

_NUM_KEPT = 64  # compiled grammars that are kept for the next request with the same one


class GrammarCompiler:
    """For one tokenizer (its tokenizers JSON) and a model of vocab_size tokens.

    Making one takes a tenth of a second for each ten thousand tokens. Raises ValueError for a tokenizer whose tokens
    are no strings of bytes, or without any EOS.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
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
        self._compile_once = lru_cache(_NUM_KEPT)(self._compile)

    def compile(self, params: StructuredOutputsParams, ignore_eos: bool) -> "GrammarConstraint":
        """A constraint at its beginning. Raises ValueError for what is no valid schema, expression or grammar."""
        eos_token_ids = self._eos_token_ids if ignore_eos else []
        matcher = self._compile_once(params).deep_copy()
        return GrammarConstraint(matcher, self._executor, self._tokenizer.vocab_size, eos_token_ids)

    def _compile(self, params: StructuredOutputsParams) -> Any:
        field, value = params.kind
        try:
            matcher = llguidance.LLMatcher(self._tokenizer, _to_grammar(field, value), log_level=0)
        except Exception as error:
            raise ValueError(f"structured_outputs.{field} cannot be compiled: {error}") from error
        if matcher.is_error():
            raise ValueError(f"structured_outputs.{field} cannot be compiled: {matcher.get_error()}")
        return matcher


class GrammarConstraint:
    """What one sequence may still say; a `TokenConstraint`.

    executor: fills masks on all cores. ruled_out: EOS tokens of a request that ignores them.
    """

    def __init__(self, matcher: Any, executor: Any, num_tokens: int, ruled_out: Sequence[int]) -> None:
        self._matcher = matcher
        self._executor = executor
        self._num_words = -(-num_tokens // 32)
        self._ruled_out = np.zeros(self._num_words, dtype=np.uint32)
        for token_id in ruled_out:
            self._ruled_out[token_id // 32] |= np.uint32(1 << token_id % 32)

    @property
    def error(self) -> str | None:
        """Why the form cannot go on: a limit of the library that it has met."""
        return cut(_first_line(self._matcher.get_error())) if self._matcher.is_error() else None

    def advance(self, token_id: int) -> bool:
        """Take the sequence's next token. Returns whether the form is complete, so that nothing can follow."""
        return bool(
            self._matcher.consume_token(token_id) and self._matcher.is_stopped() and not self._matcher.is_error()
        )

    def restart(self, token_ids: Sequence[int]) -> None:
        """Begin anew, with these tokens taken."""
        self._matcher.reset()
        self._matcher.consume_tokens(list(token_ids))

    def bitmasks(self, constraints: Sequence["GrammarConstraint"]) -> np.ndarray:
        """Which tokens may come next in each of these, int32 [n, words] as `sampling/bitmask.py` wants them."""
        words = np.zeros((len(constraints), self._num_words), dtype=np.int32)
        matchers = [(constraint._matcher, row) for row, constraint in enumerate(constraints)]
        self._executor.unsafe_compute_mask_ptr(matchers, words.ctypes.data, words.strides[0], len(words))
        for row, constraint in zip(words.view(np.uint32), constraints, strict=True):
            others = row & ~constraint._ruled_out
            if others.any():  # else only the end is left
                row[:] = others
        return words


def _first_line(text: str) -> str:
    """Without the state of the parser, which the library appends."""
    return text.split("\n<state>")[0].splitlines()[0]


def _to_grammar(field: str, value: Any) -> str:
    if field == "json":
        return llguidance.LLMatcher.grammar_from_json_schema(value)
    if field == "regex":
        return llguidance.LLMatcher.grammar_from_regex(value)
    if field == "choice":
        quoted = (json.dumps(text, ensure_ascii=False) for text in value)
        return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(quoted))
    return llguidance.LLMatcher.grammar_from_lark(gbnf_to_lark(value) if "::=" in value else value)
