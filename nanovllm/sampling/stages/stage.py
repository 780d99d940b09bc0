"""Stage: one thing that requests may ask to be done to their logits before a token is drawn. A file for each.

Owns the interface and what several stages share: which rows ask, and pairs of (row, token id) for stages on single
logits. Invariant: each row is computed from that row alone; a token that is ruled out is -inf and stays so in every
later stage.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.scheduler_output import NewRow, SchedulerOutput
from nanovllm.sampling.logits import MASKED
from nanovllm.sampling.rows import SampledRows, upload


class Stage:
    """`enter` and `begin` come with each plan, then for the rows that it samples `asks`, `apply` and `drawn`."""

    def __init__(self, max_num_seqs: int) -> None:
        self._asks = np.zeros(max_num_seqs, dtype=bool)

    def enter(self, new: NewRow) -> None:
        """Take in what the request that enters a row asks, and forget what another asked there."""
        self._asks[new.row] = self.read(new)

    def read(self, new: NewRow) -> bool:
        """Does it ever ask? Keeps, by row, what `apply` needs."""
        raise NotImplementedError

    def begin(self, plan: SchedulerOutput) -> None:
        """A step whose new rows have entered."""

    def may_ask(self, row: int) -> bool:
        return bool(self._asks[row])

    def asks(self, rows: SampledRows) -> np.ndarray:
        """Which of these n rows ask now, bool [n]."""
        return self._asks[rows.rows_host]

    def apply(self, logits: Tensor, rows: SampledRows) -> Tensor:
        """logits [n, V] float32, edited where rows ask, some of which do; what is given may be overwritten."""
        raise NotImplementedError

    def drawn(self, rows: SampledRows, tokens: Tensor) -> None:
        """The tokens [n] of these rows, each once."""


def pairs(token_ids: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Lists of tokens, one a row, as (index of the row, token id), both int64 [m]."""
    flat = np.concatenate(token_ids).astype(np.int64)
    index = np.arange(len(token_ids)).repeat([len(ids) for ids in token_ids])
    index_of_row, ids = upload(np.stack((index, flat)), device).unbind(0)
    return index_of_row, ids


def rule_out(logits: Tensor, index: Tensor, token_ids: Tensor) -> Tensor:
    """These tokens cannot be drawn. Overwrites `logits`."""
    return logits.index_put_((index, token_ids), logits.new_full((), MASKED))


NO_IDS = np.zeros(0, dtype=np.int64)
