"""Requests enter a sampler, as a plan brings them; for tests that need no engine."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nanovllm.engine.scheduler_output import NewRow, SchedulerOutput
from nanovllm.sampling.rows import SampledRows
from nanovllm.sampling.sampler import Sampler
from nanovllm.sampling_params import SamplingParams


def enter(
    sampler: Sampler,
    row: int,
    params: SamplingParams,
    seed: int,
    prompt_len: int,
    stop_ids: Sequence[int],
    token_ids: Sequence[int] | None = None,
    bad_words: tuple[tuple[int, ...], ...] = (),
) -> None:
    new = NewRow(
        row=row,
        num_computed_tokens=0,
        num_prompt_tokens=prompt_len,
        block_ids=[],
        params=params,
        seed=seed,
        stop_token_ids=tuple(stop_ids),
        token_ids=None if token_ids is None else list(token_ids),
        bad_words=bad_words,
    )
    begin(sampler, new_rows=[new])


def begin(sampler: Sampler, **fields: Any) -> None:
    """A step that plans nothing but what `fields` of the message say."""
    nothing: dict[str, Any] = {
        "new_rows": [],
        "new_blocks": [],
        "rows": [],
        "num_scheduled_tokens": [],
        "num_computed_tokens": [],
        "num_samples": [],
        "token_ids": [],
        "num_decodes": 0,
    }
    sampler.enter(SchedulerOutput(**{**nothing, **fields}))


def sampled(rows: Sequence[int] | np.ndarray, positions: Any, device: str = "cpu") -> SampledRows:
    rows_host, positions_host = np.asarray(rows, dtype=np.int32), np.asarray(positions)
    return SampledRows(
        rows_host, torch.from_numpy(rows_host).to(device), positions_host, torch.from_numpy(positions_host).to(device)
    )
