"""BatchInvariantLinear: a row's product is the same to the bit in any batch, for `deterministic=True`.

Owns nothing but the choice of the product; `kernels/fixed_linear.py` says what makes it so.
"""

from torch import Tensor

from nanovllm.kernels.dispatch import use_triton
from nanovllm.kernels.fixed_linear import fixed_linear, in_tiles
from nanovllm.layers.packed_linear import PackedLinear


class BatchInvariantLinear(PackedLinear):
    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if use_triton(x):
            return fixed_linear(x, self.weight, bias)
        product = super().multiply
        return in_tiles(lambda tile: product(tile, bias), x)
