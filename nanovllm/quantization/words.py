"""Small integers packed into 32-bit words, the lowest bits first, as AutoGPTQ and its successors write them.

Owns packing and unpacking. Invariant: numbers come out unsigned, in the order in which they lie in the words.
"""

import torch
from torch import Tensor


def unpack_words(words: Tensor, bits: int, dim: int) -> Tensor:
    """words int32 [.., n, ..] -> uint8 [.., n * 32 / bits, ..], along `dim`."""
    shifts = range(0, 32, bits)
    numbers = [((words >> shift) & (2**bits - 1)).to(torch.uint8) for shift in shifts]
    return torch.stack(numbers, dim=dim + 1).flatten(dim, dim + 1)


def signed(numbers: Tensor, bits: int) -> Tensor:
    """uint8 0 .. 2^bits - 1 -> int8, less 2^(bits - 1)."""
    return (numbers.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
