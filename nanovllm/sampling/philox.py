"""Random numbers that depend on (seed, position) and on nothing else.

Owns the counter-based generator Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
and the uniform number that a draw uses. Holds no state. Invariant: the same seed and position give the same bits on
every device and in every batch; so a token can be drawn again after a preemption.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds on 32-bit words held in int64: counter [4, n], key [2, n], each in [0, 2**32). Returns [4, n].

    int64 products wrap modulo 2**64, so their bits are the unsigned product's; the masks drop the copies of the sign.
    """
    multipliers, steps = _column(_MULTIPLIERS, counter), _column(_KEY_STEPS, counter)
    even, odd = counter[0::2], counter[1::2]  # words (0, 2) and (1, 3): each pair goes through a round as one tensor
    for _ in range(_ROUNDS):
        product = even * multipliers
        even = ((product >> 32) & _WORD).flip(0) ^ odd ^ key
        odd = (product & _WORD).flip(0)
        key = (key + steps) & _WORD
    return torch.stack((even, odd), dim=1).flatten(0, 1)


def _column(pair: tuple[int, int], like: Tensor) -> Tensor:
    """[2, 1], computed on the device: to copy it from the host would make the host wait for the device."""
    return pair[0] + torch.arange(2, device=like.device)[:, None] * (pair[1] - pair[0])


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) a row, float32 [n]: seeds [n] int64 (64 bits, two's complement), positions [n] >= 0.

    Key = the seed's low and high word, counter = (position, 0, 0, 0). Of the first word of the result the top 24 bits,
    which float32 holds exactly.
    """
    counter = torch.zeros(4, len(seeds), dtype=torch.int64, device=seeds.device)
    counter[0] = positions
    key = torch.stack((seeds & _WORD, (seeds >> 32) & _WORD))
    return (philox4x32(counter, key)[0] >> 8).to(torch.float32) * 2.0**-24
