"""Token embedding and the language-model head, their rows spread over tensor-parallel ranks.

Owns their weights; one matrix can serve as both (tied). Where the vocabulary does not divide, the last ranks have rows
of zeros that no token uses. Invariant: the head is computed only for the rows it is given, so the caller chooses the
few tokens that need logits; every rank gets all of them.
"""

import torch
from torch import Tensor, nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.ops import Ops
from nanovllm.kernels.take_rows import take_rows
from nanovllm.layers.linear import Linear
from nanovllm.layers.slots import Slots, WeightSlot


class Embedding(nn.Module):
    """input_ids [num_tokens] -> [num_tokens, hidden_size]."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.vocab_size = vocab_size
        num_rows = vocab_rows(vocab_size, tp)
        self.weight = nn.Parameter(torch.empty(num_rows, hidden_size, dtype=dtype), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.tp.size == 1:
            return take_rows(self.weight, input_ids)
        num_rows = self.weight.shape[0]
        local = input_ids - self.tp.rank * num_rows
        is_elsewhere = (local < 0) | (local >= num_rows)
        found = take_rows(self.weight, local.masked_fill(is_elsewhere, 0))
        return self.tp.all_reduce(found.masked_fill_(is_elsewhere[:, None], 0))

    def slots(self, name: str) -> Slots:
        yield _vocab_slot(f"{name}.weight", self.weight.data, self.vocab_size, self.tp)

    def equals(self, tensor: Tensor) -> bool:
        """Is this rank's part of `tensor` what it holds?"""
        if tuple(tensor.shape) != (self.vocab_size, self.weight.shape[1]):
            return False
        rows = _rows_of(tensor, self.weight.shape[0], self.tp)
        return torch.equal(rows.to(self.weight), self.weight[: len(rows)])


class LMHead(Linear):
    """hidden states [num_rows, hidden_size] -> logits [num_rows, vocab_size]; `tied_to` lends its matrix."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        dtype: torch.dtype,
        tied_to: Embedding | None,
        tp: TensorParallel,
        ops: Ops,
    ) -> None:
        num_rows = vocab_rows(vocab_size, tp) if tied_to is None else 0
        super().__init__(hidden_size, num_rows, bias=False, dtype=dtype, ops=ops)
        self.tp = tp
        self.vocab_size = vocab_size
        self.is_tied = tied_to is not None
        if tied_to is not None:
            self.weight = tied_to.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tp.all_gather(self.multiply(x), self.vocab_size)

    def slots(self, name: str) -> Slots:
        if not self.is_tied:
            yield _vocab_slot(f"{name}.weight", self.weight.data, self.vocab_size, self.tp)


def vocab_rows(vocab_size: int, tp: TensorParallel) -> int:
    """Rows of a vocabulary-parallel matrix that each rank holds, padding included."""
    if tp.size == 1:
        return vocab_size
    return -(-vocab_size // (tp.size * _ROW_MULTIPLE)) * _ROW_MULTIPLE


_ROW_MULTIPLE = 16  # matrix kernels want sizes that are multiples of this


def _vocab_slot(name: str, weight: Tensor, vocab_size: int, tp: TensorParallel) -> tuple[str, WeightSlot]:
    def fill(tensor: Tensor) -> None:
        rows = _rows_of(tensor, weight.shape[0], tp)
        weight[: len(rows)].copy_(rows)
        weight[len(rows) :].zero_()

    return name, WeightSlot((vocab_size, weight.shape[1]), fill)


def _rows_of(tensor: Tensor, num_rows: int, tp: TensorParallel) -> Tensor:
    first = tp.rank * num_rows
    return tensor[first : first + num_rows]
