"""SequentialPasses: a draft model, or a head that works like one, drafts token by token inside a captured step.

Owns the passes: one over what it has not seen, every token a place of its own, then one for each token more. Invariant:
of the target only the block tables and the rows' lengths are read.
"""

import torch
from torch import Tensor

from nanovllm.kernels.draft_places import Places, Unseen, prepare_places
from nanovllm.models.draft_heads import SteppedHead
from nanovllm.runner.graphs.verify_steps import places_metadata
from nanovllm.runner.model_runner import ModelRunner


class SequentialPasses:
    def __init__(self, runner: ModelRunner, head: SteppedHead | None, most: int, num_unseen: int) -> None:
        """runner: the draft model's, with the target's block tables. head: what it runs, where that is one. most:
        tokens of a draft.
        """
        self._runner, self._head = runner, head
        self._reads_ahead = 0 if head is None else 1  # a head reads a token at the position before it
        self.vocabulary = None if head is None else head.offsets
        max_num_seqs, device = len(runner.state.num_computed), runner.device
        self._starts = torch.arange(max_num_seqs * num_unseen + 1, dtype=torch.int32, device=device)
        back = torch.arange(1 - num_unseen, 1, dtype=torch.int32, device=device) - self._reads_ahead
        self._offsets = back.repeat(max_num_seqs)
        ahead = torch.arange(most, dtype=torch.int32, device=device) - self._reads_ahead
        self._offsets_ahead = ahead[:, None].repeat(1, max_num_seqs)
        self._nowhere = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)

    def draft(self, unseen: Unseen, num_computed: Tensor, length: int) -> Tensor:
        """See `DraftPasses`."""
        n, width = unseen.token_ids.shape
        if self._head is not None:
            self._head.is_chained = False
        places = unseen.token_rows.flatten(), self._offsets[: n * width], unseen.token_ids.flatten()
        hidden = self._pass(*places, num_computed)
        drafts = [self._pick(hidden[width - 1 :: width], unseen.rows)]
        if self._head is not None:
            self._head.is_chained = True
        for ahead in range(1, length):
            rows = unseen.rows_ahead[ahead]
            hidden = self._pass(rows, self._offsets_ahead[ahead, :n], drafts[-1], num_computed)
            drafts.append(self._pick(hidden, unseen.rows))
        return torch.stack(drafts)

    def _pass(self, rows: Tensor, offsets: Tensor, token_ids: Tensor, num_computed: Tensor) -> Tensor:
        """Hidden states; offsets: from the row's length on."""
        runner, places = self._runner, Places(rows, offsets, token_ids, token_ids)
        width = runner.state.max_blocks
        tables = runner.state.block_tables[:, :width]
        prepared = prepare_places(places, num_computed, tables, runner.block_size, width)
        meta = places_metadata(prepared, self._starts[: len(rows) + 1], runner)
        return runner.run_model(rows, prepared, meta)

    def _pick(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """The likeliest tokens; rows of a draft model's sampler are greedy."""
        logits = self._runner.compute_logits(hidden.contiguous(), rows)
        return self._runner.sampler.sample_captured(logits, rows, self._nowhere[: len(rows)])
