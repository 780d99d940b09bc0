"""BatchInvariantLinear: a row's product is the same to the bit in any batch, for `deterministic=True`.

Owns nothing but the choice of the product; `kernels/batch_invariant_linear.py` says what makes it so.
"""

from torch import Tensor

from nanovllm.kernels.batch_invariant_linear import batch_invariant_linear, in_row_tiles
from nanovllm.kernels.dispatch import use_triton
from nanovllm.layers.packed_linear import PackedLinear


class BatchInvariantLinear(PackedLinear):
    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if use_triton(x):
            return batch_invariant_linear(x, self.weight, bias)
        product = super().multiply
        return in_row_tiles(lambda tile: product(tile, bias), x)
