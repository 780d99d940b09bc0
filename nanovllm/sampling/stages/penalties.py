"""Penalties: repetition, then frequency, then presence, on tokens that were used already."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.scheduler_output import NewRow
from nanovllm.sampling.draw_columns import DrawColumns
from nanovllm.sampling.rows import SampledRows, upload
from nanovllm.sampling.stages.stage import Stage


class Penalties(Stage):
    """counts [max_num_seqs, V] int32 on the device, made when the first row asks: as in `apply_penalties`."""

    def __init__(self, max_num_seqs: int, columns: DrawColumns) -> None:
        super().__init__(max_num_seqs)
        self.columns = columns
        self.counts: Tensor | None = None

    def read(self, new: NewRow) -> bool:
        if new.params.has_penalties:
            assert new.token_ids is not None, "penalties count the tokens so far"
            self._start_counts(new.row, new.token_ids, new.num_prompt_tokens)
        return new.params.has_penalties

    def apply(self, logits: Tensor, rows: SampledRows) -> Tensor:
        assert self.counts is not None
        index = upload(np.flatnonzero(self.asks(rows)), logits.device)
        params = self.columns.select(rows.rows[index])
        penalised = apply_penalties(
            logits[index],
            self.counts.index_select(0, rows.rows[index]),
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
        )
        return logits.index_copy(0, index, penalised)

    def drawn(self, rows: SampledRows, tokens: Tensor) -> None:
        members = np.flatnonzero(self.asks(rows))
        if len(members):
            assert self.counts is not None
            index = upload(members, tokens.device)
            self.counts[rows.rows[index].long(), tokens[index].long()] += 2  # rows differ, so no pair comes twice

    def _start_counts(self, row: int, token_ids: Sequence[int], prompt_len: int) -> None:
        """Queued behind what steps in flight still count for whoever had the row before."""
        device = self.columns.device
        if self.counts is None:
            shape = (len(self.columns.host), self.columns.vocab_size)
            self.counts = torch.zeros(shape, dtype=torch.int32, device=device)
        ids, times = np.unique(np.array(token_ids[prompt_len:], dtype=np.int64), return_counts=True)
        in_prompt = np.unique(np.array(token_ids[:prompt_len], dtype=np.int64))
        pairs = np.concatenate((np.stack((ids, 2 * times)), np.stack((in_prompt, np.ones_like(in_prompt)))), axis=1)
        where, values = upload(pairs, device).unbind(0)
        self.counts[row] = 0
        self.counts[row].index_add_(0, where, values.int())


def apply_penalties(logits: Tensor, counts: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor) -> Tensor:
    """Make tokens that were used already less likely; the penalties are [n] float32.

    counts [n, V] int32: twice how often a token stands in the output, plus 1 if it stands in the prompt. Prompt and
    output: positive logits are divided by `repetition`, others multiplied (Keskar et al., 2019). Output: minus
    `frequency` for each time, minus `presence` once.
    """
    # Few tokens were used. (On a GPU the host would have to wait to learn how many; `kernels/triton/edit_logits.py`.)
    index, ids = counts.nonzero(as_tuple=True)
    used = logits[index, ids], counts[index, ids]
    return logits.index_put((index, ids), _penalise(*used, repetition[index], frequency[index], presence[index]))


def _penalise(logits: Tensor, counts: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor) -> Tensor:
    factor = torch.where(logits > 0, 1 / repetition, repetition)
    in_output = counts >> 1
    return torch.where(counts > 0, logits * factor, logits) - frequency * in_output - presence * (in_output > 0)
