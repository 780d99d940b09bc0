"""Pipeline: what requests ask of the sampler beyond how their token is drawn, stage by stage.

Owns the order of the stages, as in vLLM but for the grammar, which has the last word here:

     0. logprobs            of the raw logits: log-softmax, top k and ranks; other numbers by `logprobs_modes.py`
     1. allowed_token_ids   all other tokens are ruled out
     2. bad_words           the token that would complete one is ruled out
     3. min_tokens          stop ids are ruled out while the output is too short
     4. logit_bias          added to single logits
     5. logits_processors   Python functions, the engine's and then the request's
     6. penalties           repetition, then frequency, then presence
     7. structured_outputs  tokens that the grammar does not allow are ruled out

A new option is a file with a `Stage`, its line here, and its name in `SamplingParams.edits_logits`. Made when the first
request asks for any of it, so that a step without such requests never comes here. Invariant: rows that do not ask are
not touched; rows that do are edited in a float32 copy of their logits.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.engine.scheduler_output import NewRow, SchedulerOutput
from nanovllm.kernels.dispatch import use_triton
from nanovllm.sampling.draw_columns import DrawColumns
from nanovllm.sampling.logprobs import packed_logprobs
from nanovllm.sampling.logprobs_modes import LogprobsMode
from nanovllm.sampling.rows import SampledRows, upload
from nanovllm.sampling.stages.allowed_tokens import AllowedTokens
from nanovllm.sampling.stages.bad_words import BadWords
from nanovllm.sampling.stages.grammar import Grammar
from nanovllm.sampling.stages.histories import Histories
from nanovllm.sampling.stages.logit_bias import LogitBias
from nanovllm.sampling.stages.min_tokens import MinTokens
from nanovllm.sampling.stages.penalties import Penalties
from nanovllm.sampling.stages.python_processors import PythonProcessors
from nanovllm.sampling.stages.stage import Stage
from nanovllm.sampling_params import LogitsProcessor


class Pipeline:
    """num_logprobs, num_prompt_logprobs [max_num_seqs]: how many log-probabilities a row wants beside the token's own;
    -1: none at all."""

    def __init__(
        self, columns: DrawColumns, processors: Sequence[LogitsProcessor], tp: TensorParallel, logprobs_mode: str
    ) -> None:
        """processors: the engine's. tp: the ranks that sample the same logits. logprobs_mode: see EngineConfig."""
        self.mode = None if logprobs_mode == "raw_logprobs" else LogprobsMode(logprobs_mode, columns)
        self._vocab_size = columns.vocab_size
        max_num_seqs = len(columns.host)
        self.histories = Histories()
        self._processors = PythonProcessors(max_num_seqs, processors, self.histories, tp)
        self._penalties, self._grammar = Penalties(max_num_seqs, columns), Grammar(max_num_seqs)
        self.stages: list[Stage] = [
            AllowedTokens(max_num_seqs),
            BadWords(max_num_seqs, self.histories),
            MinTokens(max_num_seqs, columns.vocab_size),
            LogitBias(max_num_seqs),
            self._processors,
            self._penalties,
            self._grammar,
        ]
        self.num_logprobs, self.num_prompt_logprobs = np.full((2, max_num_seqs), -1, dtype=np.int64)
        self._asking: set[int] = set()  # rows that ask for more than to be drawn

    def enter(self, plan: SchedulerOutput) -> None:
        for new in plan.new_rows:
            self._enter(new)
        self.histories.begin(plan)
        for stage in self.stages:
            stage.begin(plan)

    def _enter(self, new: NewRow) -> None:
        for stage in self.stages:
            stage.enter(new)
        self.num_logprobs[new.row] = self._number(new.params.logprobs)
        self.num_prompt_logprobs[new.row] = self._number(new.params.prompt_logprobs)
        self._asking.discard(new.row)
        if new.params.logprobs is not None or any(stage.may_ask(new.row) for stage in self.stages):
            self._asking.add(new.row)

    def _number(self, asked: int | None) -> int:
        """-1 says "the whole vocabulary" in SamplingParams, and "none" here."""
        if asked is None:
            return -1
        return self._vocab_size if asked == -1 else min(asked, self._vocab_size)

    def is_plain(self, rows: Sequence[int]) -> bool:
        """Do these rows ask for no more than to be drawn from their logits as they are?"""
        return not self._asking or self._asking.isdisjoint(rows)

    def at_draft(self, index: int) -> None:
        """What follows is sampled behind so many tokens of the rows' drafts; to be called from 0 on."""
        self._grammar.at_draft(index)

    def asks(self, rows: SampledRows) -> np.ndarray:
        """Which of these rows ask for any of the stages 1 to 7 now, bool [n]."""
        return np.logical_or.reduce([stage.asks(rows) for stage in self.stages])

    def edited(self, logits: Tensor, members: np.ndarray, rows: SampledRows) -> Tensor:
        """Stages 1 to 7 for `rows`, in a copy [m, V] of their logits: float32, but where nobody asks for anything now.

        logits [n, V]; members [m] int64: which of the n these rows are.
        """
        if use_triton(logits):
            from nanovllm.sampling.stages.edits_on_gpu import edit_on_gpu

            return edit_on_gpu(logits, members, rows, self.stages[:-2], self._penalties, self._grammar)
        logits = logits[torch.from_numpy(members)].float()
        for stage in self.stages:
            if stage.asks(rows).any():
                logits = stage.apply(logits, rows)
        return logits

    def drawn(self, rows: SampledRows, tokens: Tensor) -> None:
        """What was drawn for these rows, edited or not; once for each token."""
        for stage in self.stages:
            stage.drawn(rows, tokens)

    def logprobs(self, logits: Tensor, tokens: Tensor, rows: SampledRows) -> list[tuple[np.ndarray, Tensor]]:
        """Stage 0, for the tokens [n] that were drawn: (members, what they asked for), one of each size asked for.

        members: which of the n rows; with theirs as `logprobs.packed` has it.
        """
        asked = self.num_logprobs[rows.rows_host]
        if self.mode is not None:
            return self.mode.logprobs(logits, tokens, rows, asked)
        results = []
        for k in np.unique(asked[asked >= 0]):
            members = np.flatnonzero(asked == k)
            results.append((members, packed_logprobs(logits, tokens, upload(members, logits.device), int(k))))
        return results

    def take_failures(self, rows_host: np.ndarray) -> dict[int, str]:
        """Which of these n rows, that were sampled last, have no token, and why: their Python processors failed."""
        failures, self._processors.failures = self._processors.failures, {}
        return {index: failures[row] for index, row in enumerate(rows_host.tolist()) if row in failures}
