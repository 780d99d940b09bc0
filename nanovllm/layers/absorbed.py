"""AbsorbedProjection: the matrix that makes each head's keys and values from a latent, moved to the other side.

    score of a query and a key    q · (K c)  =  (K^T q) · c          K, V: of one head; c: the token's latent
    what a head finds             Σ w (V c)  =  V (Σ w c)

Owns this matrix, of all heads of this rank, and the two products that take its place ("absorption"; DeepSeek-AI, 2024).
Invariant: keys and values are never cached, so the KV cache holds latents alone and all heads read the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.head_linear import head_linear
from nanovllm.layers.linear import LinearBase
from nanovllm.layers.linear_method import DenseLinear, LinearMethod, LinearSpec
from nanovllm.layers.ops import Ops


class AbsorbedProjection(LinearBase):
    takes_adapters = False

    def __init__(
        self, rank: int, key_dim: int, value_dim: int, num_heads: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops
    ) -> None:
        held, size = tp.part(num_heads, "num_attention_heads"), key_dim + value_dim
        rows = range(held.start * size, held.stop * size)
        super().__init__(LinearSpec((num_heads * size,), (rows,), rank, range(rank), dtype), False, ops)
        self.make_method = lambda spec: _plain(ops.linear_method(spec))
        self.key_dim, self.by_row, self._shape = key_dim, ops.by_row, (len(held), size, rank)
        self._expanded: Tensor | None = None

    def finish(self) -> None:
        super().finish()
        if not isinstance(self.method, DenseLinear):
            numbers = torch.arange(self._shape[0] * self._shape[1], device=next(self.method.parameters()).device)
            self._expanded = self.method.gather_rows(numbers)

    @property
    def matrix(self) -> Tensor:
        """[num_heads, key_dim + value_dim, rank] in the layer's dtype, whatever the checkpoint has."""
        matrix = self.method.weight if self._expanded is None else self._expanded
        return matrix.view(self._shape)  # type: ignore[operator, no-any-return]

    def expand(self, latents: Tensor) -> Tensor:
        """The product itself: latents [num_tokens, rank] -> [num_tokens, num_heads, key_dim + value_dim]."""
        return F.linear(latents, self.matrix.flatten(0, 1)).unflatten(1, self._shape[:2])

    def absorb(self, q: Tensor, out: Tensor) -> None:
        """Writes what scores latents. q [num_tokens, num_heads, key_dim], out [num_tokens, num_heads, rank]."""
        keys = self.matrix[:, : self.key_dim]
        self.by_row(lambda x, y: head_linear(x, keys, y), q, out)

    def values(self, found: Tensor) -> Tensor:
        """found [num_tokens, num_heads, rank] -> [num_tokens, num_heads * value_dim]."""
        values = self.matrix[:, self.key_dim :].transpose(1, 2)
        return self.by_row(lambda x: head_linear(x, values), found).flatten(1)


def _plain(method: LinearMethod) -> LinearMethod:
    """A dense method that keeps the matrix as it is: it is not multiplied in one piece."""
    return DenseLinear(method.spec) if isinstance(method, DenseLinear) else method
