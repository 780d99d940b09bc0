"""allowed_token_ids: all other tokens are ruled out."""

import numpy as np
from torch import Tensor

from nanovllm.engine.scheduler_output import NewRow
from nanovllm.sampling.logits import MASKED
from nanovllm.sampling.rows import SampledRows
from nanovllm.sampling.stages.stage import NO_IDS, Stage, pairs


class AllowedTokens(Stage):
    def __init__(self, max_num_seqs: int) -> None:
        super().__init__(max_num_seqs)
        self._ids = [NO_IDS] * max_num_seqs

    def read(self, new: NewRow) -> bool:
        allowed = new.params.allowed_token_ids
        self._ids[new.row] = np.unique(np.array(allowed, dtype=np.int64)) if allowed else NO_IDS
        return bool(allowed)

    def apply(self, logits: Tensor, rows: SampledRows) -> Tensor:
        return allow_only(logits, *pairs([self._ids[row] for row in rows.rows_host], logits.device))


def allow_only(logits: Tensor, index: Tensor, token_ids: Tensor) -> Tensor:
    """Rule out all tokens but these, in the rows that `index` names; other rows stay."""
    kept = logits[index, token_ids]
    return logits.index_fill(0, index, MASKED).index_put((index, token_ids), kept)
