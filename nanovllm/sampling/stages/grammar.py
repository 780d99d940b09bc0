"""The stage of grammars: what the next token may be, one bit a token.

Masks are made by the request's constraint on the host (`engine/interfaces.py`) and travel in the plan. Invariant:
something can always be drawn from a row.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.scheduler_output import NewRow, SchedulerOutput
from nanovllm.sampling.logits import MASKED
from nanovllm.sampling.rows import SampledRows, upload
from nanovllm.sampling.stages.stage import Stage


class Grammar(Stage):
    def __init__(self, max_num_seqs: int) -> None:
        super().__init__(max_num_seqs)
        self._masks: Mapping[int, np.ndarray] = {}  # of this step, by row
        self._of_drafts: Mapping[int, np.ndarray] = {}

    def read(self, new: NewRow) -> bool:
        return new.params.structured_outputs is not None

    def begin(self, plan: SchedulerOutput) -> None:
        self._masks = plan.grammar_bitmask

    def at_draft(self, index: int) -> None:
        """Of rows with drafts, take the masks behind so many tokens of theirs; to be called from 0 on."""
        if index == 0:
            self._of_drafts = {row: masks for row, masks in self._masks.items() if masks.ndim == 2}
        self._masks = {**self._masks, **{row: m[index] for row, m in self._of_drafts.items() if index < len(m)}}

    def asks(self, rows: SampledRows) -> np.ndarray:
        return np.isin(rows.rows_host, list(self._masks)) if self._masks else np.zeros(len(rows), dtype=bool)

    def apply(self, logits: Tensor, rows: SampledRows) -> Tensor:
        members = np.flatnonzero(self.asks(rows))
        index = upload(members, logits.device)
        words = upload(self.masks(rows.rows_host[members]), logits.device)
        return logits.index_copy(0, index, apply_bitmask(logits[index], words))

    def masks(self, rows_host: np.ndarray) -> np.ndarray:
        """Of these rows [n], all of which ask, int32 [n, words]."""
        return np.stack([self._masks[row] for row in rows_host.tolist()])


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
