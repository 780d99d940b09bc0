"""ChainedSteps: drafts and their verification as one captured step, which begins where the one before ended.

Owns what the device remembers for that, of each row the tokens drawn last and how many of its draft they accepted; the
layout of such a step, and its order: the tokens that the draft model has not seen, drafts behind them, and all of them
verified. `draft_passes.py` and `runner/dflash.py` draft, `verify_steps.py` verifies. Invariant: nothing is computed at
a place for which a row has no block; a row's draft may be shorter than the step's, and what is behind it is padding.
"""

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.scheduler_output import SchedulerOutput
from nanovllm.kernels.draft_places import Unseen, draft_places, find_unseen, note_drawn
from nanovllm.kernels.triton.common.launch import dependent_launch
from nanovllm.runner.extras import NO_EXTRAS
from nanovllm.runner.graphs.graph_runner import GraphRunner
from nanovllm.runner.graphs.layouts import DecodeLayout
from nanovllm.runner.graphs.verify_steps import PendingReplay, VerifySteps
from nanovllm.runner.model_runner import ModelRunner, PendingTokens


class DraftPasses(Protocol):
    vocabulary: Tensor | None  # as `draft_places` takes it

    def draft(self, unseen: Unseen, num_computed: Tensor, length: int) -> Tensor:
        """The tokens that follow, int32 [length, n]; can be captured. num_computed: of the target's rows, which is
        where a row's newest token stands.
        """
        ...


class ChainInputs(NamedTuple):
    """rows, limits: as in Unseen. given: as `find_unseen` takes it. length: of the drafts."""

    rows: Tensor
    limits: Tensor
    given: Tensor
    length: int


ChainSize = tuple[int, int]  # rows, length


class ChainLayout:
    def __init__(self, max_num_seqs: int, num_unseen: int) -> None:
        self._sizes = DecodeLayout(max_num_seqs).sizes
        self._num_unseen = num_unseen

    def size(self, plan: SchedulerOutput) -> ChainSize:
        return next(size for size in self._sizes if size >= len(plan.rows)), plan.num_draft_steps

    def words(self, size: ChainSize) -> int:
        return (2 + self._num_unseen) * size[0]

    def inputs(self, static: Tensor, size: ChainSize) -> ChainInputs:
        rows, limits, token_ids = static.split((size[0], size[0], self._num_unseen * size[0]))
        return ChainInputs(rows, limits, token_ids.view(size[0], self._num_unseen), size[1])

    def fill(self, words: np.ndarray, size: ChainSize, plan: SchedulerOutput | None) -> None:
        rows, limits, token_ids = np.split(words, (size[0], 2 * size[0]))
        words.fill(-1)
        limits.fill(0)
        if plan is None:
            return
        rows[: len(plan.rows)] = plan.rows
        limits[: len(plan.rows)] = np.array(plan.num_scheduled_tokens) - 1
        for places, row in zip(token_ids.reshape(size[0], -1), plan.rows, strict=False):
            if unseen := plan.unseen_tokens.get(row):
                places[-len(unseen) :] = unseen


class ChainedSteps:
    def __init__(
        self, target: GraphRunner, runner: ModelRunner, passes: DraftPasses, most: int, num_unseen: int, pdl: bool
    ) -> None:
        """runner: the target's. most: tokens of a draft. pdl: as `dependent_launch` takes it."""
        self._runner, self._passes, self._pdl = runner, passes, pdl
        max_num_seqs, device = len(runner.state.num_computed), runner.device
        self._layout = ChainLayout(max_num_seqs, num_unseen)
        self._verify = VerifySteps(runner, max_num_seqs * (1 + most))
        self._graphs = target.graphs_of(self._step, self._layout, (max_num_seqs, most))
        # The last row is padding's.
        self._drawn = torch.zeros(max_num_seqs + 1, 1 + most, dtype=torch.int32, device=device)
        self._accepted = torch.zeros(max_num_seqs + 1, dtype=torch.int32, device=device)

    @torch.inference_mode()
    def execute(self, plan: SchedulerOutput) -> PendingTokens:
        """Queue one step."""
        with dependent_launch(self._pdl):
            if plan.new_blocks:
                self._runner.stage(plan)
            self._runner.sampler.columns.upload()
            size = self._layout.size(plan)
            words, _ = self._graphs.run(size, plan)
            pending = self._runner.read_back(words)
        return PendingReplay(pending.tokens, pending.event, NO_EXTRAS, [1 + size[1]] * len(plan.rows))

    def _step(self, inputs: ChainInputs) -> tuple[Tensor, Tensor]:
        """What is captured: `PendingReplay.tokens`, with 1 + length places for each row, and logits."""
        unseen = find_unseen(inputs.rows, inputs.limits, inputs.given, self._drawn, self._accepted, inputs.length)
        drafts = self._passes.draft(unseen, self._runner.state.num_computed, inputs.length)
        words, logits = self._verify.step(draft_places(unseen, drafts, self._passes.vocabulary))
        note_drawn(words, inputs.rows, self._drawn, self._accepted)
        return words, logits
