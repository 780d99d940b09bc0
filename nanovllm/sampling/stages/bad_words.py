"""bad_words: the token that would complete one is ruled out."""

import numpy as np
from torch import Tensor

from nanovllm.engine.scheduler_output import NewRow
from nanovllm.sampling.rows import SampledRows
from nanovllm.sampling.stages.histories import Histories
from nanovllm.sampling.stages.stage import NO_IDS, Stage, pairs, rule_out


class BadWords(Stage):
    def __init__(self, max_num_seqs: int, histories: Histories) -> None:
        super().__init__(max_num_seqs)
        self._histories = histories
        self._words: dict[int, tuple[tuple[int, ...], ...]] = {}
        self._prompt_lens = np.zeros(max_num_seqs, dtype=np.int64)

    def read(self, new: NewRow) -> bool:
        self._words[new.row], self._prompt_lens[new.row] = new.bad_words, new.num_prompt_tokens
        return bool(new.bad_words)

    def apply(self, logits: Tensor, rows: SampledRows) -> Tensor:
        return rule_out(logits, *pairs([self._completing(int(row)) for row in rows.rows_host], logits.device))

    def _completing(self, row: int) -> np.ndarray:
        """Tokens that would complete a word after the row's output so far."""
        words = self._words.get(row)
        if not words:
            return NO_IDS
        history = self._histories.of(row)
        found = []
        for *before, last in words:
            begin = len(history) - len(before)
            if not before or (begin >= self._prompt_lens[row] and history[begin:] == before):
                found.append(last)
        return np.unique(np.array(found, dtype=np.int64))
