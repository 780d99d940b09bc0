"""RoundedProduct: products with one quantized matrix in whole numbers on a CPU, as `rounded_linear.cpp` makes them.

Owns the checks between tensors and pointers. A step of a small model makes a hundred of these products, of some
microseconds each, so what is true of a matrix is checked once, when the product is made; and the norm before it and the
activation after it come in the same call. Invariant: bits are those of the norm, the product and the activation by
themselves.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_GATES = {None: 0, "silu": 1, "gelu_tanh": 2}


class RoundedProduct:
    """x W^T + b of x rounded as by round_rows(x, "int8", 32): any number of rows, each as it would be alone."""

    def __init__(self, run: Mapping[torch.dtype, Callable[..., None]], weight: tuple[Tensor | None, ...], bits: int):
        """weight: codes, scale, low; they stay where they are."""
        codes, scale, _ = self._weight = weight
        assert codes is not None and scale is not None
        self._run, self._pointers = run, tuple(None if t is None else t.data_ptr() for t in weight)
        self.num_outputs, self.num_inputs = len(codes), codes.shape[1] * 8 // bits
        self._sizes = self.num_outputs, self.num_inputs, scale.shape[1], bits

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x [num_rows, inputs] -> [num_rows, outputs]; None where x is of another dtype."""
        run = self._run.get(x.dtype)
        if run is None or not self._takes(x.dtype, bias, self.num_outputs):
            return None
        x, num_rows = x.contiguous(), x.shape[0]
        out = x.new_empty(num_rows, self.num_outputs)
        bias_ptr = None if bias is None else bias.data_ptr()
        run(*self._pointers, x.data_ptr(), bias_ptr, out.data_ptr(), None, None, None, num_rows, *self._sizes, 0, 0.0)
        return out

    def after_norm(
        self, x: Tensor, residual: Tensor | None, norm: tuple[Tensor, float], bias: Tensor | None, gate: str | None
    ) -> tuple[Tensor, Tensor] | None:
        """(gate(product of the RMS norm of x + residual), x + residual); norm: its weight and epsilon.

        gate: "silu" or "gelu_tanh", which make one half of the outputs of two. None where the C++ does not apply.
        """
        (weight, eps), dtype, run = norm, x.dtype, self._run.get(x.dtype)
        if run is None or not (
            x.is_contiguous()
            and self._takes(dtype, weight, self.num_inputs)
            and self._takes(dtype, bias, self.num_outputs)
            and (residual is None or (residual.dtype == dtype and residual.is_contiguous()))
        ):
            return None
        num_rows, total = x.shape[0], x if residual is None else torch.empty_like(x)
        out = x.new_empty(num_rows, self.num_outputs if gate is None else self.num_outputs // 2)
        others = bias, out, residual, weight, None if residual is None else total
        pointers = [None if t is None else t.data_ptr() for t in others]
        run(*self._pointers, x.data_ptr(), *pointers, num_rows, *self._sizes, _GATES[gate], eps)
        return out, total

    @staticmethod
    def _takes(dtype: torch.dtype, x: Tensor | None, size: int) -> bool:
        return x is None or (x.dtype == dtype and x.numel() == size and x.is_contiguous())


def make_rounded_product(
    run: Mapping[torch.dtype, Callable[..., None]], codes: Tensor, scale: Tensor, low: Tensor | None
) -> RoundedProduct | None:
    """run: the C++ function by the dtype of x."""
    bits = 4 if codes.dtype == torch.uint8 else 8
    num_groups, num_inputs = scale.shape[1], codes.shape[1] * 8 // bits
    group_sizes = (32,) if bits == 4 else (16, 32)
    halves = [t for t in (scale, low) if t is not None]
    if (
        codes.dtype in (torch.uint8, torch.int8)
        and codes.is_contiguous()
        and num_inputs % 32 == 0
        and num_inputs in [num_groups * size for size in group_sizes]
        and all(t.dtype == torch.float16 and t.numel() == scale.numel() and t.is_contiguous() for t in halves)
    ):
        return RoundedProduct(run, (codes, scale, low), bits)
    return None
