"""SequentialPasses: a draft model, or a head that works like one, drafts token by token inside a captured step.

Owns the passes: one over what it has not seen, every token a place of its own, then one for each token more. Invariant:
of the target only the block tables and the rows' lengths are read.
"""

import torch
from torch import Tensor

from nanovllm.kernels.draft_places import Places, prepare_places
from nanovllm.models.draft_heads import SteppedHead
from nanovllm.runner.graphs.chained_steps import Unseen
from nanovllm.runner.graphs.verify_steps import places_metadata
from nanovllm.runner.model_runner import ModelRunner


class SequentialPasses:
    def __init__(self, runner: ModelRunner, head: SteppedHead | None) -> None:
        """runner: the draft model's, with the target's block tables. head: what it runs, where that is one."""
        self._runner, self._head = runner, head
        self._reads_ahead = 0 if head is None else 1  # a head reads a token at the position before it

    def draft(self, unseen: Unseen, num_computed: Tensor, length: int) -> Tensor:
        """See `DraftPasses`."""
        rows, limits, token_ids = unseen
        n, width = token_ids.shape
        if self._head is not None:
            self._head.is_chained = False
        back = torch.arange(width, dtype=torch.int32, device=rows.device) - (width - 1) - self._reads_ahead
        hidden = self._pass(
            torch.where(token_ids < 0, -1, rows[:, None]).flatten(),
            back.expand(n, -1).flatten(),
            token_ids.flatten(),
            num_computed,
        )
        drafts = [self._pick(hidden[width - 1 :: width], rows)]
        if self._head is not None:
            self._head.is_chained = True
        for ahead in range(1, length):
            offsets = torch.full_like(rows, ahead - self._reads_ahead)
            hidden = self._pass(torch.where(ahead <= limits, rows, -1), offsets, drafts[-1], num_computed)
            drafts.append(self._pick(hidden, rows))
        drafted = torch.stack(drafts, dim=1)
        return drafted if self._head is None else self._head.as_target(drafted)

    def _pass(self, rows: Tensor, offsets: Tensor, token_ids: Tensor, num_computed: Tensor) -> Tensor:
        """Hidden states; offsets: from the row's length on."""
        runner, places = self._runner, Places(rows, offsets, token_ids, token_ids)
        width = runner.state.max_blocks
        tables = runner.state.block_tables[:, :width]
        prepared = prepare_places(places, num_computed, tables, runner.block_size, width)
        return runner.run_model(rows, prepared, places_metadata(prepared, runner))

    def _pick(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """The likeliest tokens; rows of a draft model's sampler are greedy."""
        logits = self._runner.compute_logits(hidden.contiguous(), rows)
        return self._runner.sampler.sample_captured(logits, rows, torch.zeros_like(rows))
