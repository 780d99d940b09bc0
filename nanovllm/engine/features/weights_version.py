"""WeightsVersion: which weights the engine computes with, as a number for people and as the root of block hashes.

Owns what names weights; `cache_manager.py` begins every chain of hashes with it. Invariant: the root is the same for
the same weights and never for others, in this process or another, so who keeps blocks may name them by their hashes.
"""

from typing import NamedTuple
from uuid import uuid4


class WeightsVersion(NamedTuple):
    """number: of updates until then. root: empty for the weights that the engine was built with, else 16 bytes."""

    number: int = 0
    root: bytes = b""

    def next(self) -> "WeightsVersion":
        """The name of weights that nobody has had before."""
        return WeightsVersion(self.number + 1, uuid4().bytes)
