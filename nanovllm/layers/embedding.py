"""Token embedding and the language-model head, their rows spread over tensor-parallel ranks.

Owns which rows a rank holds; one matrix can serve as both (tied). Where the vocabulary does not divide, the last ranks
have rows of zeros that no token uses. Invariant: the head is computed only for the rows it is given, so the caller
chooses the few tokens that need logits; every rank gets all of them.
"""

import torch
from torch import Tensor

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.linear import LinearBase
from nanovllm.layers.linear_method import LinearSpec
from nanovllm.layers.ops import Ops
from nanovllm.layers.weight_specs import WeightSpecs


class Embedding(LinearBase):
    """input_ids [num_tokens] -> [num_tokens, hidden_size]."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        super().__init__(_vocab_spec(vocab_size, hidden_size, dtype, tp), bias=False, ops=ops)
        self.tp = tp

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.tp.size == 1:
            return self.method.gather_rows(input_ids)
        (held,) = self.spec.parts
        local = input_ids - held.start
        is_elsewhere = (local < 0) | (local >= len(held))
        found = self.method.gather_rows(local.masked_fill(is_elsewhere, 0))
        return self.tp.all_reduce(found.masked_fill_(is_elsewhere[:, None], 0))

    def finish(self) -> None:
        """Nothing: a layout for products is not one for rows."""

    def equals(self, tensor: Tensor) -> bool:
        """Is this rank's part of `tensor` what it holds?"""
        (held,), (vocab_size,) = self.spec.parts, self.spec.sizes
        if tuple(tensor.shape) != (vocab_size, self.spec.in_features):
            return False
        rows = tensor[held.start : held.stop]
        own = self.method.gather_rows(torch.arange(len(rows), device=next(self.parameters()).device))
        return torch.equal(rows.to(own), own)


class LMHead(LinearBase):
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
        super().__init__(_vocab_spec(vocab_size, hidden_size, dtype, tp), bias=False, ops=ops)
        self.tp = tp
        self.vocab_size = vocab_size
        self.is_tied = tied_to is not None
        if tied_to is not None:
            self.make_method = lambda spec: tied_to.method.tied()

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits if self.tp.size == 1 else self.tp.all_gather(logits, self.vocab_size)

    def weights(self, *names: str) -> WeightSpecs:
        """None for a tied head. Those of the table that it is tied to come first."""
        weight_specs = list(super().weights(*names))
        yield from () if self.is_tied else weight_specs


def vocab_rows(vocab_size: int, tp: TensorParallel) -> int:
    """Rows of a vocabulary-parallel matrix that each rank holds, padding included."""
    if tp.size == 1:
        return vocab_size
    return -(-vocab_size // (tp.size * _ROW_MULTIPLE)) * _ROW_MULTIPLE


_ROW_MULTIPLE = 16  # matrix kernels want sizes that are multiples of this


def _vocab_spec(vocab_size: int, hidden_size: int, dtype: torch.dtype, tp: TensorParallel) -> LinearSpec:
    num_rows = vocab_rows(vocab_size, tp)
    held = range(tp.rank * num_rows, (tp.rank + 1) * num_rows)
    return LinearSpec((vocab_size,), (held,), hidden_size, range(hidden_size), dtype)
