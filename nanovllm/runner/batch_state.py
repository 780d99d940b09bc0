"""BatchState: what the device remembers of each running request, one row each.

        row | num_computed | block_table ...        and what the sampler keeps (`sampling/draw_columns.py`)

Owns these tensors; who sits in which row is the scheduler's decision. Invariant: a row is complete once its NewRow has
been applied, so nothing is saved when a request leaves and nothing is restored when it returns.
"""

import numpy as np
import torch

from nanovllm.engine.scheduler_output import SchedulerOutput


class BatchState:
    def __init__(self, max_num_seqs: int, max_blocks: int, device: torch.device, num_groups: int = 1) -> None:
        """max_blocks: of a table; a row has one for each group of layers, side by side."""
        self.max_blocks = max_blocks
        self.num_computed = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(max_num_seqs, num_groups * max_blocks, dtype=torch.int32, device=device)
        self.rope_len = np.zeros(max_num_seqs, dtype=np.int64)  # host only

    def enter(self, plan: SchedulerOutput) -> None:
        """Host side of new rows; what they compute with travels with the step's upload."""
        for new in plan.new_rows:
            self.rope_len[new.row] = new.rope_len

    def apply(self, computed: torch.Tensor, blocks: torch.Tensor) -> None:
        """computed [n, 2]: (row, num_computed); blocks [m, 2]: (place in all rows' tables, block). All int32."""
        if computed.shape[0]:
            self.num_computed[computed[:, 0]] = computed[:, 1]
        if blocks.shape[0]:
            self.block_tables.view(-1)[blocks[:, 0]] = blocks[:, 1]
