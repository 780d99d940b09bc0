"""The context that a request's tokens count as part of, for models whose keys depend on it (`layers/rope_scaling.py`).

Owns which prompts have keys of their own, and contexts that become long while they grow (longrope). Invariant: keys of
one kind are never taken for those of another, nor found in the prefix cache under one name.
"""

from dataclasses import dataclass
from typing import NamedTuple

from nanovllm.engine.request import Request

LONG_SALT = b"long"  # cache_salt of contexts that are long for a model whose keys change there


@dataclass(slots=True)
class Context:
    """rope_len: the length that the prompt's positions count as part of.

    recompute_from: with more tokens than this, the KV of all of them is computed anew; None if that never comes, or has
    come: outgrown_at is then what it was.
    """

    rope_len: int
    recompute_from: int | None = None
    outgrown_at: int | None = None

    def is_outgrown_by(self, num_tokens: int) -> bool:
        return self.recompute_from is not None and num_tokens > self.recompute_from


class ContextRule(NamedTuple):
    """length_dependent_from, long_from: as in `InputProcessor`."""

    length_dependent_from: int | None
    long_from: int | None

    def of_prompt(self, num_prompt_tokens: int, max_total_tokens: int) -> tuple[bytes, Context]:
        """The request's cache_salt and context."""
        threshold, long_from = self
        if long_from is not None and num_prompt_tokens > long_from:
            return LONG_SALT, Context(num_prompt_tokens)
        is_dependent = threshold is not None and num_prompt_tokens > threshold
        salt = num_prompt_tokens.to_bytes(8, "little") if is_dependent else b""
        grows_long = long_from is not None and long_from < max_total_tokens
        return salt, Context(num_prompt_tokens, long_from if grows_long else None)


def become_long(request: Request, context: Context) -> None:
    """All of its tokens, which hold no blocks now, are to be computed as part of a long context."""
    context.rope_len, context.outgrown_at = len(request.token_ids), context.recompute_from
    _change_salt(request, LONG_SALT)
    context.recompute_from = None  # last: an interruption before finds the rest to be done


def become_short(request: Request, context: Context, num_tokens: int) -> None:
    """Undo `become_long`, if it came with a token behind these, which are taken back."""
    if context.rope_len > num_tokens:
        context.rope_len, context.recompute_from = request.num_prompt_tokens, context.outgrown_at
        _change_salt(request, b"")


def _change_salt(request: Request, salt: bytes) -> None:
    request.cache_salt = salt if request.adapter is None else salt + request.adapter.key
    request.block_hashes = []
