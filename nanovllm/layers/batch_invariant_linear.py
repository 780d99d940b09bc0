"""BatchInvariantLinear: a row's product is the same to the bit in any batch, for `deterministic=True`.

Owns nothing but the choice of the product; `kernels/batch_invariant_linear.py` says what makes it so.
"""

from torch import Tensor

from nanovllm.kernels.batch_invariant_linear import batch_invariant_gated_linear, batch_invariant_linear, in_row_tiles
from nanovllm.kernels.dispatch import use_triton
from nanovllm.layers.linear_method import Gate, LinearSpec, Norm
from nanovllm.layers.packed_linear import PackedLinear


class BatchInvariantLinear(PackedLinear):
    """semaphores: as in `fused_linear.py`."""

    def __init__(self, spec: LinearSpec, semaphores: Tensor | None = None) -> None:
        super().__init__(spec)
        self.semaphores = semaphores

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if use_triton(x):
            return batch_invariant_linear(x, self.weight, bias, self.semaphores)
        product = super().multiply
        return in_row_tiles(lambda tile: product(tile, bias), x)

    def multiply_after_norm(
        self, norm: Norm, x: Tensor, residual: Tensor | None, bias: Tensor | None, gate: Gate | None = None
    ) -> tuple[Tensor, Tensor]:
        if gate is None or not use_triton(x):
            return super().multiply_after_norm(norm, x, residual, bias, gate)
        x, total = norm(x, residual)
        return batch_invariant_gated_linear(x, self.weight, bias, gate.activation, self.semaphores), total
