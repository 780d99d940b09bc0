"""FusedLinear: dense weights on a GPU, multiplied by this project's kernels where rows are few.

Owns nothing but the choice of the fused forms; `kernels/skinny_linear.py` says what they are and when they run.
"""

from torch import Tensor

from nanovllm.kernels.skinny_linear import gated_linear, rms_norm_gated_linear, rms_norm_linear, skinny_linear
from nanovllm.layers.linear_method import DenseLinear, Gate, LinearSpec, Norm


class FusedLinear(DenseLinear):
    """semaphores: room for counters (`skinny_gemm.new_semaphores`), shared by layers that run one after the other."""

    def __init__(self, spec: LinearSpec, semaphores: Tensor | None = None) -> None:
        super().__init__(spec)
        self.semaphores = semaphores

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return skinny_linear(x, self.weight, bias, self.semaphores)

    def multiply_after_norm(
        self, norm: Norm, x: Tensor, residual: Tensor | None, bias: Tensor | None, gate: Gate | None = None
    ) -> tuple[Tensor, Tensor]:
        if norm.weight is None:
            x, total = norm(x, residual)
            if gate is None:
                return self.multiply(x, bias), total
            return gated_linear(x, self.weight, bias, gate.activation, self.semaphores), total
        inputs = x, residual, norm.weight, norm.eps, self.weight, bias
        if gate is None:
            return rms_norm_linear(*inputs, self.semaphores)
        return rms_norm_gated_linear(*inputs, gate.activation, self.semaphores)
