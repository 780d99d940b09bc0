"""pack_linear: a linear layer whose weight is laid out once for oneDNN's matrix kernels, on a CPU.

Owns the decision whether that pays and the packed copy. Invariant: the result of `F.linear` up to the order of
additions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# oneDNN lays a weight out for an expected number of rows. The layout for 64 is as good for one row as one made for it,
# and no worse for thousands.
EXPECTED_ROWS = 64


def pack_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    """weight [out_features, in_features], bias [out_features] -> x [rows, in_features] -> [rows, out_features].

    None if the plain product is to be kept: not on a CPU, oneDNN not built in, or no fast kernel for the dtype on this
    CPU. The function holds its own copy of the weight; the caller may free the original.
    """
    if weight.is_cpu and torch._C._has_mkldnn and _has_fast_kernel(weight.dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), EXPECTED_ROWS)
        product = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: product(x, packed, bias, "none", [], "")
    return None


def _has_fast_kernel(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32
