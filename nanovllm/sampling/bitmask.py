"""The stage of grammars: what the next token may be, one bit a token.

Owns the arithmetic, as a pure function; masks are made by the request's constraint on the host (`engine/interfaces.py`)
and travel in the plan. Invariant: a row is computed from that row alone, and something can always be drawn from it.
"""

import torch
from torch import Tensor

from nanovllm.sampling.logits import MASKED


def apply_bitmask(logits: Tensor, words: Tensor) -> Tensor:
    """Rule out each token whose bit is 0: token i is bit i % 32 of word i // 32, lowest bit first.

    logits [n, V] float; words [n, >= ceil(V / 32)] int32. The grammar has the last word: where other stages have ruled
    out all that it allows, the allowed tokens become equally likely.
    """
    bits = torch.arange(32, dtype=torch.int32, device=words.device)
    allowed = ((words[:, :, None] >> bits) & 1).bool().flatten(1)[:, : logits.shape[1]]
    masked = logits.masked_fill(~allowed, MASKED)
    is_empty = (masked == MASKED).all(-1, keepdim=True)
    return torch.where(is_empty & allowed, 0.0, masked)
