"""What the kernels of layers with a state have in common.

Owns the part of a step that is behind its decodes, and the counters by which a decode's programs know who is the last.
Invariant: counters are 0 between kernels.
"""

from dataclasses import replace

import torch
from torch import Tensor

from nanovllm.kernels.state_types import StepStates


def behind_decodes(step: StepStates, num_decodes: int) -> StepStates:
    """The requests of a step but the first ones; their tokens keep their places."""
    meta = step.meta
    others = replace(
        meta,
        query_start_loc=meta.query_start_loc[num_decodes:],
        seq_lens=meta.seq_lens[num_decodes:],
        num_decodes=0,
        num_reqs=meta.num_reqs - num_decodes,
    )
    return StepStates(step.rows[num_decodes:], step.snapshots, others, step.layers)


def counters(count: int, device: torch.device, semaphores: Tensor | None) -> Tensor:
    """semaphores: those that the caller keeps (`skinny_gemm.new_semaphores`); if they are too few, others are made."""
    if semaphores is not None and count <= semaphores.numel():
        return semaphores
    return torch.zeros(count, dtype=torch.int32, device=device)
