"""min_tokens: stop ids are ruled out while the output is too short."""

import numpy as np
from torch import Tensor

from nanovllm.engine.scheduler_output import NewRow
from nanovllm.sampling.rows import SampledRows
from nanovllm.sampling.stages.stage import NO_IDS, Stage, pairs, rule_out


class MinTokens(Stage):
    """min_length [max_num_seqs]: no stop token at a position below this; 0: off."""

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        super().__init__(max_num_seqs)
        self._vocab_size = vocab_size
        self.stop_ids = [NO_IDS] * max_num_seqs
        self.min_length = np.zeros(max_num_seqs, dtype=np.int64)

    def read(self, new: NewRow) -> bool:
        # An id outside the vocabulary has no logit to hold back: a tokenizer may know more ids than the model.
        asked = new.stop_token_ids if new.params.min_tokens else ()
        known = sorted({stop_id for stop_id in asked if 0 <= stop_id < self._vocab_size})
        self.stop_ids[new.row] = np.array(known, dtype=np.int64) if known else NO_IDS
        self.min_length[new.row] = new.num_prompt_tokens + new.params.min_tokens if known else 0
        return bool(known)

    def asks(self, rows: SampledRows) -> np.ndarray:
        return rows.positions_host < self.min_length[rows.rows_host]

    def apply(self, logits: Tensor, rows: SampledRows) -> Tensor:
        ids = [
            self.stop_ids[row] if asks else NO_IDS for row, asks in zip(rows.rows_host, self.asks(rows), strict=True)
        ]
        return rule_out(logits, *pairs(ids, logits.device))
