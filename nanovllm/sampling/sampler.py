"""Sampler: the last logits of each request become its next token.

The order of the stages; 0 to 7, what rows may ask for beyond how they are drawn, are `stages/pipeline.py`'s:

     8. greedy              argmax, the lowest id on a tie                             rows with temperature 0; done
        temperature         logits / temperature                                       all other rows
     9. min_p               drop tokens below min_p times the highest probability      rows that ask
    10. top_k               keep the k highest, with ties                              rows that ask
    11. top_p               keep the nucleus of what is left, at least one token       rows that ask
    12. draw                lowest id where the CDF exceeds uniform(seed, position)    all sampled rows

Owns the choice of route; `logits.py` owns the arithmetic, `draw_columns.py` the parameters. On a GPU, stages 8 to 12
are `kernels/triton/sample.py`, which reads the parameters there. On a CPU the host mirrors say which rows need what, so
a stage that nobody asked for is not run. Invariant: a row's token depends on its logits, parameters, history, seed and
position alone, and so does the route to it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.engine.scheduler_output import SchedulerOutput
from nanovllm.kernels.dispatch import use_triton
from nanovllm.sampling.buckets import apply_top_p_by_buckets
from nanovllm.sampling.draw_columns import DrawColumns, RowParams
from nanovllm.sampling.edited_rows import sample_edited
from nanovllm.sampling.logits import (
    MASKED,
    apply_min_p,
    apply_temperature,
    apply_top_k,
    apply_top_p,
    find_candidates,
    pick_by_weight,
    pick_highest,
    rows_of_chunk,
)
from nanovllm.sampling.philox import uniform
from nanovllm.sampling.rows import SampledRows
from nanovllm.sampling.stages.pipeline import Pipeline
from nanovllm.sampling_params import LogitsProcessor

_NUM_CANDIDATES = 128  # what the filters look at first; rows that keep more are filtered whole


class Sampler:
    """pipeline: stages 0 to 7; None until a request asks for any of them, which few do."""

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        device: torch.device | str,
        processors: Sequence[LogitsProcessor] = (),
        is_deterministic: bool = False,
        tp: TensorParallel | None = None,
        logprobs_mode: str = "raw_logprobs",
    ) -> None:
        """processors: Python functions that run for every row. tp: the ranks that sample the same logits."""
        self.columns = DrawColumns(max_num_seqs, vocab_size, device)
        self.pipeline: Pipeline | None = None
        self._processors = tuple(processors)
        self._is_deterministic, self._logprobs_mode = is_deterministic, logprobs_mode
        self._tp = tp or TensorParallel()

    def enter(self, plan: SchedulerOutput) -> None:
        """Take in new rows and, for those that need them, new tokens."""
        for new in plan.new_rows:
            self.columns.set_row(new.row, new.params, new.seed)
        if self.pipeline is None and self._needs_pipeline(plan):
            self.pipeline = Pipeline(self.columns, self._processors, self._tp, self._logprobs_mode)
        if self.pipeline is not None:
            self.pipeline.enter(plan)

    def _needs_pipeline(self, plan: SchedulerOutput) -> bool:
        """Does a new row ask for logits, their log-probabilities, or a prompt's?"""
        return any(
            self._processors or new.token_ids is not None or new.params.logprobs is not None or new.params.edits_logits
            for new in plan.new_rows
        )

    def is_plain(self, rows: Sequence[int]) -> bool:
        """Do these rows ask for no more than to be drawn from their logits as they are?"""
        return self.pipeline is None or self.pipeline.is_plain(rows)

    def sample(self, logits: Tensor, rows: SampledRows) -> Tensor:
        """Next tokens, int32 [n]; `DrawColumns.last_token` keeps them by row. logits [n, V] of any float dtype, left
        unchanged.
        """
        if self.pipeline is None:
            return self.draw(logits, rows)
        return sample_edited(self, logits, rows)

    def sample_captured(self, logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Stages 8 to 12 on a GPU and without the host, so that it can be captured in a CUDA graph.

        Reads `DrawColumns.columns` as last uploaded, and keeps the tokens as `sample` does. rows, positions int32; a
        row of -1 is padding, which gives token 0 and keeps nothing.
        """
        from nanovllm.kernels.triton.sample import sample_triton

        columns = self.columns
        return sample_triton(logits, rows, positions, columns.columns, columns.last_token, self._is_deterministic)

    # -- stages 8 to 12 --

    def draw(self, logits: Tensor, rows: SampledRows) -> Tensor:
        """Without stages 1 to 7; each row's token is also kept in `last_token`."""
        if use_triton(logits):
            self.columns.upload()
            return self.sample_captured(logits, rows.rows, rows.positions)
        asked = self.columns.host[rows.rows_host]
        greedy = asked["temperature"] == 0
        filtered = ~greedy & _asks_for_a_filter(asked)
        tokens = torch.empty(len(rows), dtype=torch.int32)
        for members in (greedy, ~greedy & ~filtered, filtered):
            if members.all():
                tokens.copy_(self._pick(logits, asked, rows.rows, rows.positions))
            elif members.any():
                index = torch.from_numpy(np.flatnonzero(members))
                picked = self._pick(logits[index], asked[members], rows.rows[index], rows.positions[index])
                tokens[index] = picked.int()
        self.columns.last_token[rows.rows] = tokens
        return tokens

    def _pick(self, logits: Tensor, asked: np.ndarray, rows: Tensor, positions: Tensor) -> Tensor:
        """Tokens of rows that are all greedy, all plain, or all filtered; on a CPU."""
        if asked["temperature"][0] == 0:
            return pick_highest(logits)
        params = self.columns.select(rows)
        noise = uniform(params.seed, positions)
        size = rows_of_chunk(logits.device, logits.shape[1])
        picked = []
        for start in range(0, len(logits), size):
            part = slice(start, start + size)
            scaled = apply_temperature(logits[part], params.temperature[part])
            picked.append(
                _filter_and_draw(scaled, RowParams(*(column[part] for column in params)), asked[part], noise[part])
            )
        return torch.cat(picked)


def _asks_for_a_filter(asked: np.ndarray) -> np.ndarray:
    return (asked["min_p"] > 0) | (asked["top_k"] > 0) | (asked["top_p"] < 1)


def _filter_and_draw(scaled: Tensor, params: RowParams, asked: np.ndarray, noise: Tensor) -> Tensor:
    """Filter and draw. The filters look at the highest tokens first, and at whole rows only where these do not settle
    it, since to search whole rows is dear.
    """
    if not _asks_for_a_filter(asked).any():
        return pick_by_weight(scaled.softmax(-1), noise)
    if scaled.shape[1] <= _NUM_CANDIDATES:
        return pick_by_weight(_filter(scaled, params, asked)[0].softmax(-1), noise)
    total = 1 / scaled.softmax(-1).amax(-1) if (asked["top_p"] < 1).any() else None
    values, ids = find_candidates(scaled, _NUM_CANDIDATES)
    values, is_exact = _filter(values, params, asked, total)
    tokens = ids.gather(1, pick_by_weight(values.softmax(-1), noise)[:, None])[:, 0]
    rest = (~is_exact).nonzero()[:, 0]
    if len(rest):
        values, _ = _filter(scaled[rest], RowParams(*(column[rest] for column in params)), asked[rest.numpy()])
        tokens[rest] = pick_by_weight(values.softmax(-1), noise[rest])
    return tokens


def _filter(values: Tensor, params: RowParams, asked: np.ndarray, total: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """min_p, top_k and top_p on scaled logits [n, width]: whole rows, or their `width` highest tokens.

    Also returns bool [n]: would the whole row have kept the same tokens? It would if what is kept lies above the lowest
    candidate, for all others are at most as high as that one, and if the total that top_p compares with was right.
    total [n]: the weight of the whole row in units of its highest token, for top_p on candidates.
    """
    lowest, highest = values.aminmax(dim=-1)
    kept = values
    if (asked["min_p"] > 0).any():
        kept = apply_min_p(kept, params.min_p)
    if (asked["top_k"] > 0).any():
        kept = apply_top_k(kept, params.top_k, int(asked["top_k"].max()))
    is_exact = _lowest_kept(kept) > lowest
    if (asked["top_p"] < 1).any():
        outside = None
        if total is not None:
            inside = (values - highest[:, None]).exp().sum(-1)
            outside = (total - inside).clamp(min=0).masked_fill(is_exact, 0.0)
        is_exact |= (params.min_p == 0) & (params.top_k == 0)
        if kept.shape[1] <= _NUM_CANDIDATES:
            kept = apply_top_p(kept, params.top_p, outside)
        else:
            kept = apply_top_p_by_buckets(kept, params.top_p)
        is_exact &= _lowest_kept(kept) > lowest
    return kept, is_exact


def _lowest_kept(values: Tensor) -> Tensor:
    return values.masked_fill(values == MASKED, torch.inf).amin(-1)
