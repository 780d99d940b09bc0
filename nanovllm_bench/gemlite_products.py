"""gemlite's products, for `nanovllm bench products --compare gemlite`.

Owns how its layers are made of the same numbers: "int4" in groups of 128 with zero points, "int8" and "fp8" with a
scale for each output and inputs as they are. Invariant: gemlite chooses its kernels itself, and tunes those that its
table for the GPU does not have.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_GROUP = 128


def load_gemlite() -> Callable[[str, Tensor], "GemliteProduct | None"]:
    if find_spec("gemlite") is None:
        raise ImportError("--compare gemlite needs that library in this environment: pip install gemlite")
    if not torch.cuda.is_available():
        raise ValueError("--compare gemlite needs a GPU, which gemlite's kernels are for")
    return lambda form, dense: None if form == "dense" else GemliteProduct(form, dense)


class GemliteProduct:
    def __init__(self, form: str, dense: Tensor) -> None:
        from gemlite import helper

        device = str(dense.device)
        if form == "int4":
            codes, scale, zero = _round_to_uint4(dense)
            layer = helper.A16W4_HQQ_INT(device=device, dtype=dense.dtype).from_weights(codes, scale, zero)
        else:
            maker = helper.A16W8_INT8 if form == "int8" else helper.A16W8_FP8
            layer = maker(device=device, dtype=dense.dtype).from_weights(dense.clone())
        self._layer: Any = layer
        tensors = [*layer.parameters(), *layer.buffers()]
        self.num_bytes = sum(t.numel() * t.element_size() for t in tensors)

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self._layer(x)
        return result


def _round_to_uint4(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 .. 15 [outputs, inputs], and scales and zero points [outputs * groups, 1]: (code - zero) * scale."""
    groups = dense.float().view(-1, _GROUP)
    low, high = groups.amin(dim=1, keepdim=True).clamp(max=0), groups.amax(dim=1, keepdim=True).clamp(min=0)
    scale = (high - low).clamp(min=1e-12) / 15
    zero = (-low / scale).round()
    codes = (groups / scale + zero).round().clamp(0, 15)
    return codes.view(dense.shape).to(torch.uint8), scale.to(dense.dtype), zero.to(dense.dtype)
