"""BatchState: what the device remembers of each running request, one row each.

        row | num_computed | block_table ...        and what the sampler keeps (`sampling/state.py`)

Owns these tensors; who sits in which row is the scheduler's decision. Invariant: a row is complete once its NewRow has
been applied, so nothing is saved when a request leaves and nothing is restored when it returns.
"""

from collections.abc import Sequence

import numpy as np
import torch

from nanovllm.engine.scheduler_output import SchedulerOutput
from nanovllm.sampling.state import SamplingState
from nanovllm.sampling_params import LogitsProcessor


class BatchState:
    def __init__(
        self,
        max_num_seqs: int,
        max_blocks: int,
        vocab_size: int,
        device: torch.device,
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        self.max_blocks = max_blocks
        self.num_computed = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32, device=device)
        self.sampling = SamplingState(max_num_seqs, vocab_size, device, processors)
        self.rope_len = np.zeros(max_num_seqs, dtype=np.int64)  # host only

    def enter(self, plan: SchedulerOutput) -> None:
        """Host side of new rows and new tokens; what they compute with travels with the step's upload."""
        for new in plan.new_rows:
            self.rope_len[new.row] = new.rope_len
            self.sampling.set_row(
                new.row,
                new.params,
                new.seed,
                new.num_prompt_tokens,
                new.stop_token_ids,
                new.token_ids,
                new.bad_words,
            )
        self.sampling.bitmasks = plan.grammar_bitmask
        self.sampling.extend_histories(plan.rows, plan.num_computed_tokens, plan.num_scheduled_tokens, plan.token_ids)

    def apply(self, computed: torch.Tensor, blocks: torch.Tensor) -> None:
        """computed [n, 2]: (row, num_computed); blocks [m, 2]: (row * max_blocks + index, block id). All int32."""
        if computed.shape[0]:
            self.num_computed[computed[:, 0]] = computed[:, 1]
        if blocks.shape[0]:
            self.block_tables.view(-1)[blocks[:, 0]] = blocks[:, 1]
