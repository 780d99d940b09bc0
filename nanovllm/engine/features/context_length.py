"""Contexts that become long, for models whose keys are others there (longrope, see `layers/rope_scaling.py`).

Owns what a request then is. Invariant: keys of short and of long contexts are never taken for each other, nor found in
the prefix cache under one name.
"""

from nanovllm.engine.request import LONG_SALT, Request


def become_long(request: Request) -> None:
    """All of its tokens, which hold no blocks now, are to be computed as part of a long context."""
    request.rope_len = len(request.token_ids)
    request.cache_salt, request.block_hashes = LONG_SALT, []
    request.recompute_from = None  # last: an interruption before finds the rest to be done
