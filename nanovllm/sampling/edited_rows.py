"""Rows whose logits are edited before their token is drawn (stages 1 to 7 of `stages/pipeline.py`), beside others.

Owns who is drawn when: rows that ask for nothing from their logits as they are, the others from an edited copy.
Invariant: every token of a step is drawn once for good, and only then counted for penalties.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels.dispatch import use_triton
from nanovllm.sampling.logits import rows_of_chunk
from nanovllm.sampling.rows import SampledRows, upload

if TYPE_CHECKING:
    from nanovllm.sampling.sampler import Sampler


def sample_edited(sampler: "Sampler", logits: Tensor, rows: SampledRows) -> Tensor:
    """As `Sampler.sample`, where there is a pipeline."""
    edited = find_edited(sampler, rows)
    if len(edited) == 0:
        return sampler.draw(logits, rows)
    tokens = _draw_others(sampler, logits, edited, rows)
    _redraw(sampler, logits, tokens, edited, rows)
    return tokens


def redraw_edited(sampler: "Sampler", logits: Tensor, tokens: Tensor, rows: SampledRows) -> None:
    """Replace the tokens [n], drawn from the logits as they are, of those rows that ask for any of the stages 1 to 7.

    It comes once for each token.
    """
    edited = find_edited(sampler, rows)
    if len(edited):
        _redraw(sampler, logits, tokens, edited, rows)


def find_edited(sampler: "Sampler", rows: SampledRows) -> np.ndarray:
    """Which of these n rows ask for any of the stages 1 to 7 now, int64 [m]."""
    return np.zeros(0, dtype=np.int64) if sampler.pipeline is None else np.flatnonzero(sampler.pipeline.asks(rows))


def _redraw(sampler: "Sampler", logits: Tensor, tokens: Tensor, edited: np.ndarray, rows: SampledRows) -> None:
    pipeline = sampler.pipeline
    assert pipeline is not None
    size = rows_of_chunk(logits.device, logits.shape[1])
    for start in range(0, len(edited), size):
        part = edited[start : start + size]
        index, members = upload(part, logits.device), rows.select(part)
        edited_logits = pipeline.edited(logits, part, members)
        tokens[index] = sampler.draw(edited_logits, members)
        if pipeline.mode is not None:
            pipeline.mode.keep(edited_logits, tokens[index], members, pipeline.num_logprobs[members.rows_host])
    pipeline.drawn(rows, tokens)


def _draw_others(sampler: "Sampler", logits: Tensor, edited: np.ndarray, rows: SampledRows) -> Tensor:
    """As `Sampler.draw`, but for the rows that are edited first; their tokens are yet to come."""
    if use_triton(logits):
        sampler.columns.upload()
        others = rows.rows.index_fill(0, upload(edited, logits.device), -1)
        return sampler.sample_captured(logits, others, rows.positions)
    tokens = torch.empty(len(rows), dtype=torch.int32)
    members = np.delete(np.arange(len(rows)), edited)
    if len(members):
        index = torch.from_numpy(members)
        tokens[index] = sampler.draw(logits[index], rows.select(members))
    return tokens
