"""The stages that edit single logits: what a request rules out, favours or penalises.

Owns the arithmetic, as pure functions on logits [n, V] float32; does not know requests or batches. What rows ask for
comes as pairs (index of the row in `logits`, token id), both int64 [m]. Invariant: each row is computed from that row
alone; a token that is ruled out is -inf, and stays so in every later stage.
"""

import torch
from torch import Tensor

from nanovllm.sampling.logits import MASKED


def allow_only(logits: Tensor, index: Tensor, token_ids: Tensor) -> Tensor:
    """Rule out all tokens but these, in the rows that `index` names; other rows stay."""
    kept = logits[index, token_ids]
    return logits.index_fill(0, index, MASKED).index_put((index, token_ids), kept)


def rule_out(logits: Tensor, index: Tensor, token_ids: Tensor) -> Tensor:
    """These tokens cannot be drawn."""
    return logits.index_put((index, token_ids), logits.new_full((), MASKED))


def add_bias(logits: Tensor, index: Tensor, token_ids: Tensor, bias: Tensor) -> Tensor:
    """bias [m] float32 on the logits of these tokens; a pair comes at most once."""
    return logits.index_put((index, token_ids), logits[index, token_ids] + bias)


def apply_penalties(logits: Tensor, counts: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor) -> Tensor:
    """Make tokens that were used already less likely; the penalties are [n] float32.

    counts [n, V] int32: twice how often a token stands in the output, plus 1 if it stands in the prompt. Prompt and
    output: positive logits are divided by `repetition`, others multiplied (Keskar et al., 2019). Output: minus
    `frequency` for each time, minus `presence` once.
    """
    if not logits.is_cpu:
        return _penalise(logits, counts, repetition[:, None], frequency[:, None], presence[:, None])
    # Few tokens were used. On a GPU the host would have to wait to learn how many, and whole rows are cheap.
    index, ids = counts.nonzero(as_tuple=True)
    used = logits[index, ids], counts[index, ids]
    return logits.index_put((index, ids), _penalise(*used, repetition[index], frequency[index], presence[index]))


def _penalise(logits: Tensor, counts: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor) -> Tensor:
    factor = torch.where(logits > 0, 1 / repetition, repetition)
    in_output = counts >> 1
    return torch.where(counts > 0, logits * factor, logits) - frequency * in_output - presence * (in_output > 0)
