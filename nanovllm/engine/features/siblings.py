"""Siblings: the sequences of one prompt hash it once, and share its blocks without a prefix cache.

Owns no state. Invariant: siblings share what all of them have, the prompt, and only while their keys are the same: one
whose context has become long, or that was begun with other weights, has others (`hash_root`).
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nanovllm.engine.request import Request

if TYPE_CHECKING:
    from nanovllm.engine.cache_manager import BlockTables, CacheManager


def alike(request: Request) -> Iterator[Request]:
    """Siblings whose blocks would do for the request, itself among them."""
    return (sibling for sibling in request.siblings if sibling.hash_root == request.hash_root)


def longest_held(cache: "CacheManager", request: Request, last: int) -> "BlockTables | None":
    """Of the request's prompt, as much as a sibling holds, in at most `last` blocks of each table."""
    last = min(last, request.num_prompt_tokens // cache.block_size)
    held = (cache.longest(cache.held(one), min(last, one.num_published_blocks)) for one in alike(request))
    return max(held, key=cache.num_tokens, default=None)


def prompt_hashes(request: Request, block_size: int) -> list[bytes]:
    """Hashes of the prompt's blocks, as far as a sibling knows them."""
    longest = max(alike(request), key=lambda sibling: len(sibling.block_hashes))
    return longest.block_hashes[: request.num_prompt_tokens // block_size]
