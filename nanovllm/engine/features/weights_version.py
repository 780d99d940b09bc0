"""WeightsVersion: which weights the engine computes with, as a number for people and as the root of block hashes.

Owns what names weights, and the note that a request keeps of them; `cache_manager.py` begins every chain of hashes with
the root. Invariant: the root is the same for the same weights and never for others, in this process or another, so who
keeps blocks may name them by their hashes.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

if TYPE_CHECKING:
    from nanovllm.engine.request import Request


class WeightsVersion(NamedTuple):
    """number: of updates until then. root: empty for the weights that the engine was built with, else 16 bytes."""

    number: int = 0
    root: bytes = b""

    def next(self) -> "WeightsVersion":
        """The name of weights that nobody has had before."""
        return WeightsVersion(self.number + 1, uuid4().bytes)


def begin_with(request: "Request", root: bytes, version: WeightsVersion) -> None:
    """The request gets its blocks anew, under this root: of these weights and its salt."""
    request.hash_root, request.block_hashes = root, []
    note_version([request], version)


def note_version(requests: Iterable["Request"], version: WeightsVersion) -> None:
    """What these sample from here on is of this version.

    `weights_versions` has (index among the output tokens, number) where a version begins; before the first it is 0.
    """
    for request in requests:
        notes = request.weights_versions
        if version.number != (notes[-1][1] if notes else 0):
            notes.append((len(request.token_ids) - request.num_prompt_tokens, version.number))


def changes_between(notes: Sequence[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """The notes as of output tokens start .. end - 1 alone."""
    changes: list[tuple[int, int]] = []
    for index, number in notes:
        if index < end:
            if index <= start:
                changes.clear()
            changes.append((max(index - start, 0), number))
    return changes
