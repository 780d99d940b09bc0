"""The context that each token of a step counts as part of, for models whose rotation depends on it.

Owns the rule (`layers/rope_scaling.py` says what is made of it). Invariant: it depends on the request alone, not on how
its prompt was cut into steps.
"""

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.scheduler_output import SchedulerOutput


def rope_lens(plan: SchedulerOutput, prompts: np.ndarray, device: torch.device) -> Tensor:
    """Per token its whole prompt, or all up to an output token itself; prompts [num_reqs]: `NewRow.rope_len`."""
    lens = [
        np.maximum(prompt, np.arange(start + 1, start + count + 1))
        for prompt, start, count in zip(prompts, plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True)
    ]
    return torch.from_numpy(np.concatenate(lens)).to(device)
