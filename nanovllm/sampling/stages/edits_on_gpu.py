"""Stages 1 to 7 on a GPU: what changes single logits by PyTorch, the two stages that read whole rows in one kernel.

Owns that split, and the list of kernels that requests may ask for and a captured step does not launch. Invariant: the
result is that of the stages one by one, in their order.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels.triton.edit_logits import edit_logits_triton
from nanovllm.kernels.triton.top_logprobs import top_logprobs_triton
from nanovllm.sampling.rows import SampledRows, upload
from nanovllm.sampling.sampler import Sampler
from nanovllm.sampling.stages.grammar import Grammar
from nanovllm.sampling.stages.penalties import Penalties
from nanovllm.sampling.stages.stage import Stage


def edit_on_gpu(
    logits: Tensor,
    members: np.ndarray,
    rows: SampledRows,
    before: Sequence[Stage],
    penalties: Penalties,
    grammar: Grammar,
) -> Tensor:
    """As `Pipeline.edited`. before: the stages ahead of penalties and grammars."""
    index = upload(members, logits.device)
    asked = [stage for stage in before if stage.asks(rows).any()]
    if asked:
        logits = logits[index].float()
        for stage in asked:
            logits = stage.apply(logits, rows)
        index = upload(np.arange(len(members)), logits.device)
    counts = penalties.counts if penalties.asks(rows).any() else None
    words = places = None
    if (constrained := grammar.asks(rows)).any():
        words = upload(grammar.masks(rows.rows_host[constrained]), logits.device)
        places = upload(np.where(constrained, np.cumsum(constrained) - 1, -1).astype(np.int32), logits.device)
    elif counts is None:
        return logits
    return edit_logits_triton(logits, index, rows.rows, penalties.columns.upload(), counts, words, places)


def warm_up_edits(sampler: Sampler, logits: Tensor, rows: Tensor) -> None:
    """Launch all that requests may ask for beyond a plain step, for kernels to be compiled; see `common/warmup.py`.

    logits [n, V], rows [n] int32 of -1: of a step without requests.
    """
    columns = sampler.columns.columns
    for size in (1, 64):  # the sampler has kernels for few rows
        some, members = rows[:size], torch.zeros(min(size, len(rows)), dtype=torch.int64, device=rows.device)
        edited = edit_logits_triton(logits[:size], members, some, columns, columns, columns, some)
        edit_logits_triton(edited, members, some, columns, columns, columns, some)  # if single logits were changed
        sampler.sample_captured(edited, some, some)
    top_logprobs_triton(logits[:size], some, members, k=1)
