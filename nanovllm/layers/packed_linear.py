"""PackedLinear: a linear layer whose weight is laid out once for oneDNN's matrix kernels, on a CPU.

Owns the decision whether that pays and the packed copy. Invariant: the result of `F.linear` up to the order of
additions.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.layers.linear_method import DenseLinear, LinearSpec
from nanovllm.layers.renewal import PackedRenewal

# oneDNN lays a weight out for an expected number of rows. The layout for 64 is as good for one row as one made for it,
# and no worse for thousands.
EXPECTED_ROWS = 64


class PackedLinear(PackedRenewal, DenseLinear):
    """Dense until `finish`; then in oneDNN's layout alone, if it has a fast kernel for the dtype on this CPU."""

    def __init__(self, spec: LinearSpec, plain: Callable[..., Tensor] = F.linear) -> None:
        """plain(x, weight, bias): the product with the plain weight; any but PyTorch's is worth keeping it."""
        super().__init__(spec)
        self._plain = plain
        self._packed: Tensor | None = None

    def finish(self) -> None:
        self._packed = None if self.is_shared or self._plain is not F.linear else pack(self.weight)
        if self._packed is not None:
            self.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # frees the plain copy

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._plain(x, self.weight, bias) if self._packed is None else multiply_packed(x, self._packed, bias)


def pack(weight: Tensor) -> Tensor | None:
    """weight [out_features, in_features] in oneDNN's layout, a copy; the caller may free the original.

    None if the plain product is to be kept: not on a CPU, oneDNN not built in, or no fast kernel for the dtype on this
    CPU.
    """
    if weight.is_cpu and torch._C._has_mkldnn and _has_fast_kernel(weight.dtype):
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), EXPECTED_ROWS)  # type: ignore[no-any-return]
    return None


def multiply_packed(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x [rows, in_features] -> [rows, out_features]."""
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]


def _has_fast_kernel(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32
