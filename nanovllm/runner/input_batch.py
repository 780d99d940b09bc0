"""InputBatch: a plan becomes one packed upload, and the views that the device reads it through.

Owns the layout of that upload. Invariant: one copy to the device a step; staging buffers rotate, one more than steps
can be in flight, so the host never overwrites an upload that has not run yet.

        | rows | query_start_loc | token_ids | sampled | new rows (row, num_computed) | new blocks (place, block) |
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.scheduler_output import SchedulerOutput


@dataclass(frozen=True, kw_only=True)
class InputBatch:
    """Views into the upload, int32 on the device; NumPy arrays for what the host needs as well."""

    rows: Tensor  # [num_reqs]
    query_start_loc: Tensor  # [num_reqs + 1]
    token_ids: Tensor  # [num_tokens]
    sampled: Tensor  # [num_sampled], index into the requests
    new_rows: Tensor  # [num_new, 2]
    new_blocks: Tensor  # [num_new_blocks, 2]
    rows_host: np.ndarray  # [num_reqs]
    sampled_host: np.ndarray  # [num_sampled]


class InputStager:
    """Packs plans into pinned host buffers (plain ones on a CPU) and copies them without waiting."""

    def __init__(self, max_blocks: int, num_buffers: int, device: torch.device) -> None:
        self._max_blocks = max_blocks
        self._device = device
        self._buffers = [torch.empty(0, dtype=torch.int32) for _ in range(num_buffers)]
        self._next = 0

    def stage(self, plan: SchedulerOutput) -> InputBatch:
        rows = np.array(plan.rows, dtype=np.int32)
        starts = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(plan.num_scheduled_tokens, out=starts[1:])
        sampled = np.flatnonzero(plan.num_samples).astype(np.int32)
        new_rows = [(new.row, new.num_computed_tokens) for new in plan.new_rows]
        new_blocks = [(row * self._max_blocks + index, block_id) for row, index, block_id in plan.new_blocks]
        for new in plan.new_rows:
            first = new.row * self._max_blocks
            new_blocks.extend(enumerate(new.block_ids, first))
        parts = (
            rows,
            starts,
            np.array(plan.token_ids, dtype=np.int32),
            sampled,
            np.array(new_rows, dtype=np.int32).reshape(-1),
            np.array(new_blocks, dtype=np.int32).reshape(-1),
        )
        views = self._upload(np.concatenate(parts)).split([len(part) for part in parts])
        return InputBatch(
            rows=views[0],
            query_start_loc=views[1],
            token_ids=views[2],
            sampled=views[3],
            new_rows=views[4].view(-1, 2),
            new_blocks=views[5].view(-1, 2),
            rows_host=rows,
            sampled_host=sampled,
        )

    def _upload(self, packed: np.ndarray) -> Tensor:
        if self._device.type == "cpu":
            return torch.from_numpy(packed)
        staging = self._buffers[self._next]
        if staging.numel() < len(packed):
            staging = torch.empty(2 * len(packed), dtype=torch.int32, pin_memory=True)
            self._buffers[self._next] = staging
        self._next = (self._next + 1) % len(self._buffers)
        staging.numpy()[: len(packed)] = packed
        return staging[: len(packed)].to(self._device, non_blocking=True)
