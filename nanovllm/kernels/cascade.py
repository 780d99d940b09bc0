"""Cascade attention: decodes that share a prefix read its keys and values once, for all of them together.

Owns what the kernels are told of a step's shared prefixes (Hydragen, Juravsky et al., 2024; cascade inference, Ye et
al., 2024). `engine/shared_prefixes.py` finds them, `runner/cascade_items.py` cuts them into items. Invariant: attention
comes out as without it, up to rounding.

    tokens      0 ......... 1024 ............. 3072 ......         a system prompt, and documents behind it
    request 0   |- prefix 0 -||--- prefix 1 ---|| own
    request 1   |            ||                || own              three prefixes: of requests 0 to 3, 0 and 1, 2 and 3
    request 2   |            ||--- prefix 2 ---|| own
    request 3   |            ||                || own

An item is a part of a prefix for some of its requests. What an item makes of a request is its output over those keys
alone and the logarithm of the sum of its weights, from which the request's own attention starts.
"""

from dataclasses import dataclass

from torch import Tensor

TILE = 64  # tokens: prefixes begin and end at a multiple of it, and of the block size
ROWS = 64  # queries of an item: its requests, times the query heads that share a KV head
ITEM_FIELDS = 5
MAX_ROOM = 2048  # results that a step may leave, for each head: items' requests, added up


@dataclass(frozen=True)
class CascadeInputs:
    """The items of one step, int32 on the device; serves every layer.

    num_items [1]. items [room, 5]: first request, number of requests, first token, end, part. shared_lens [n]: tokens
    of each request that items cover. num_parts [n]: results that they leave for it, parts 0, 1, ...
    """

    num_items: Tensor
    items: Tensor
    shared_lens: Tensor
    num_parts: Tensor

    @property
    def max_parts(self) -> int:
        return max_parts(self.shared_lens.shape[0])


def max_parts(num_reqs: int) -> int:
    """Of one request."""
    return max(4, MAX_ROOM // num_reqs)


def max_items(num_reqs: int) -> int:
    return max(64, 2 * num_reqs)


def num_words(num_reqs: int) -> int:
    """int32 words that the inputs take."""
    return 1 + max_items(num_reqs) * ITEM_FIELDS + 2 * num_reqs


def cascade_inputs(words: Tensor, num_reqs: int) -> CascadeInputs:
    """Views into [num_words(num_reqs)] int32, as `runner/cascade_items.py` fills them."""
    room = max_items(num_reqs) * ITEM_FIELDS
    num_items, items, shared_lens, num_parts = words.split([1, room, num_reqs, num_reqs])
    return CascadeInputs(num_items, items.view(-1, ITEM_FIELDS), shared_lens, num_parts)
