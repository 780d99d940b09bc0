"""Token embedding and the language-model head.

Owns their weights; one matrix can serve as both (tied). Invariant: the head is computed only for the rows it is given,
so the caller chooses the few tokens that need logits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.kernels.ops import Ops
from nanovllm.layers.linear import Linear
from nanovllm.layers.slots import Slots, parameter_slot


class Embedding(nn.Module):
    """input_ids [num_tokens] -> [num_tokens, hidden_size]."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self.weight)

    def slots(self, name: str) -> Slots:
        yield parameter_slot(f"{name}.weight", self.weight)


class LMHead(Linear):
    """hidden states [num_rows, hidden_size] -> logits [num_rows, vocab_size]; `tied_to` lends its matrix."""

    def __init__(
        self, vocab_size: int, hidden_size: int, dtype: torch.dtype, tied_to: Embedding | None, ops: Ops
    ) -> None:
        super().__init__(hidden_size, vocab_size if tied_to is None else 0, bias=False, dtype=dtype, ops=ops)
        self.is_tied = tied_to is not None
        if tied_to is not None:
            self.weight = tied_to.weight

    def slots(self, name: str) -> Slots:
        if not self.is_tied:
            yield parameter_slot(f"{name}.weight", self.weight)
