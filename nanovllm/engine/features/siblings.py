"""Siblings: the sequences of one prompt hash it once, and share its blocks without a prefix cache.

Owns no state. Invariant: siblings share what all of them have, the prompt, and only while their keys are the same: one
whose context has become long has others (`cache_salt`).
"""

from collections.abc import Iterator

from nanovllm.engine.request import Request


def alike(request: Request) -> Iterator[Request]:
    """Siblings whose blocks would do for the request, itself among them."""
    return (sibling for sibling in request.siblings if sibling.cache_salt == request.cache_salt)


def prompt_hashes(request: Request, block_size: int) -> list[bytes]:
    """Hashes of the prompt's blocks, as far as a sibling knows them."""
    longest = max(alike(request), key=lambda sibling: len(sibling.block_hashes))
    return longest.block_hashes[: request.num_prompt_tokens // block_size]
