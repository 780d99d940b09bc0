"""logit_bias: added to single logits."""

import numpy as np
from torch import Tensor

from nanovllm.engine.scheduler_output import NewRow
from nanovllm.sampling.rows import SampledRows, upload
from nanovllm.sampling.stages.stage import NO_IDS, Stage, pairs

_NO_BIAS = np.zeros(0, dtype=np.float32)  # rows' biases are joined: one of another dtype would change all of them


class LogitBias(Stage):
    def __init__(self, max_num_seqs: int) -> None:
        super().__init__(max_num_seqs)
        self._ids = [NO_IDS] * max_num_seqs
        self._bias = [_NO_BIAS] * max_num_seqs

    def read(self, new: NewRow) -> bool:
        bias = new.params.logit_bias
        self._ids[new.row] = np.array(list(bias), dtype=np.int64) if bias else NO_IDS
        self._bias[new.row] = np.array(list(bias.values()), dtype=np.float32) if bias else _NO_BIAS
        return bool(bias)

    def apply(self, logits: Tensor, rows: SampledRows) -> Tensor:
        bias = upload(np.concatenate([self._bias[row] for row in rows.rows_host]), logits.device)
        return add_bias(logits, *pairs([self._ids[row] for row in rows.rows_host], logits.device), bias)


def add_bias(logits: Tensor, index: Tensor, token_ids: Tensor, bias: Tensor) -> Tensor:
    """bias [m] float32 on the logits of these tokens; a pair comes at most once. Overwrites `logits`."""
    return logits.index_put_((index, token_ids), logits[index, token_ids] + bias)
