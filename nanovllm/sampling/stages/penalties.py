"""Penalties: repetition, then frequency, then presence, on tokens that were used already."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.scheduler_output import NewRow, SchedulerOutput
from nanovllm.sampling.draw_columns import DrawColumns
from nanovllm.sampling.rows import SampledRows, upload
from nanovllm.sampling.stages.stage import Stage, pairs


class Penalties(Stage):
    """counts [max_num_seqs, V] int32 on the device, made when the first row asks: as in `apply_penalties`."""

    def __init__(self, max_num_seqs: int, columns: DrawColumns) -> None:
        super().__init__(max_num_seqs)
        self.columns = columns
        self.counts: Tensor | None = None

    def read(self, new: NewRow) -> bool:
        return new.params.has_penalties

    def begin(self, plan: SchedulerOutput) -> None:
        if new_rows := [new for new in plan.new_rows if new.params.has_penalties]:
            self._start_counts(new_rows)

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

    def _start_counts(self, new_rows: Sequence[NewRow]) -> None:
        """Queued behind what steps in flight still count for whoever had the rows before."""
        device = self.columns.device
        if self.counts is None:
            shape = (len(self.columns.host), self.columns.vocab_size)
            self.counts = torch.zeros(shape, dtype=torch.int32, device=device)
        prompts, outputs = [], []
        for new in new_rows:
            assert new.token_ids is not None, "penalties count the tokens so far"
            prompts.append(np.array(new.token_ids[: new.num_prompt_tokens], dtype=np.int64))
            outputs.append(np.array(new.token_ids[new.num_prompt_tokens :], dtype=np.int64))
        rows = upload(np.array([new.row for new in new_rows], dtype=np.int64), device)
        self.counts.index_fill_(0, rows, 0)
        for token_ids, value, adds_up in ((prompts, 1, False), (outputs, 2, True)):
            if any(map(len, token_ids)):
                index, ids = pairs(token_ids, device)
                self.counts.index_put_((rows[index], ids), self.counts.new_full((), value), accumulate=adds_up)


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
