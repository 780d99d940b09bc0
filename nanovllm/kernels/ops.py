"""Ops: the operations between a model's matrix products, in the form that suits device and `compilation`.

Owns the choice, made once when a model is built and handed to its layers. Invariant: every form computes what the
references beside it define, up to rounding, so a model is written once and runs in all of them.

    compilation    norms and activation                      rotation and KV store
    "kernels"      Triton on a GPU, C++ on a CPU             the same
    "inductor"     the references, fused by torch.compile    as "kernels"
    "none"         the references, one PyTorch call each     as "kernels" on a GPU, the reference on a CPU
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.native import load_native
from nanovllm.kernels.qkv_rope_store import qkv_rope_store, qkv_rope_store_reference
from nanovllm.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from nanovllm.kernels.silu_and_mul import silu_and_mul, silu_and_mul_reference


class Ops(NamedTuple):
    """See the function of the same name in `kernels/` for each contract."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    silu_and_mul: Callable[[Tensor], Tensor]
    qkv_rope_store: Callable[..., Tensor]


PLAIN = Ops(rms_norm_reference, add_rms_norm_reference, silu_and_mul_reference, qkv_rope_store_reference)
BY_DEVICE = Ops(rms_norm, add_rms_norm, silu_and_mul, qkv_rope_store)


def choose_ops(device: torch.device, compilation: str) -> Ops:
    """compilation: as in `EngineConfig`."""
    kernels = BY_DEVICE
    if device.type == "cpu" and compilation != "none":
        native = load_native()
        if native is not None:
            kernels = Ops(native.rms_norm, native.add_rms_norm, native.silu_and_mul, native.qkv_rope_store)
    if compilation == "kernels":
        return kernels
    store = kernels.qkv_rope_store
    if compilation == "none":
        return PLAIN._replace(qkv_rope_store=store if device.type == "cuda" else qkv_rope_store_reference)
    return Ops(
        torch.compile(rms_norm_reference, dynamic=True),
        torch.compile(add_rms_norm_reference, dynamic=True),
        torch.compile(silu_and_mul_reference, dynamic=True),
        store,
    )
