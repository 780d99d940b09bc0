"""Ops: the operations between a model's matrix products, in the form that suits device and `compilation`.

Owns the choice, made once when a model is built and handed to its layers. Invariant: every form computes what the
references beside it define, up to rounding, so a model is written once and runs in all of them.

    compilation    norms and activation                      products                      rotation and KV store
    "kernels"      Triton on a GPU, C++ on a CPU             with norm and activation,     Triton or C++
                                                             for few rows on a GPU
    "inductor"     the references, fused by torch.compile    PyTorch's                     as "kernels"
    "none"         the references, one PyTorch call each     PyTorch's                     as "kernels" on a GPU

What stands around the layers (a step's inputs, rows of tables, attention, sampling) is the same in all of them.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.fixed_linear import fixed_linear
from nanovllm.kernels.moe import fused_experts, fused_experts_reference
from nanovllm.kernels.native import load_native
from nanovllm.kernels.qkv_rope_store import qkv_rope_store, qkv_rope_store_reference
from nanovllm.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from nanovllm.kernels.silu_and_mul import (
    gelu_and_mul,
    gelu_and_mul_reference,
    silu_and_mul,
    silu_and_mul_reference,
)
from nanovllm.kernels.small_linear import rms_norm_gated_linear, rms_norm_linear, small_linear


class Ops(NamedTuple):
    """See the function of the same name in `kernels/` for each contract."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    silu_and_mul: Callable[[Tensor], Tensor]
    gelu_and_mul: Callable[[Tensor], Tensor]
    qkv_rope_store: Callable[..., Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear
    # (x, residual, norm weight, eps, weight, bias) -> (product, x + residual); None: norm and product apart
    rms_norm_linear: Callable[..., tuple[Tensor, Tensor]] | None = None
    # (..., activation)
    rms_norm_gated_linear: Callable[..., tuple[Tensor, Tensor]] | None = None
    fused_experts: Callable[..., Tensor] = fused_experts
    is_deterministic: bool = False  # `linear` is `fixed_linear`, and products by other means go `in_tiles`


PLAIN = Ops(
    rms_norm_reference,
    add_rms_norm_reference,
    silu_and_mul_reference,
    gelu_and_mul_reference,
    qkv_rope_store_reference,
)
BY_DEVICE = Ops(rms_norm, add_rms_norm, silu_and_mul, gelu_and_mul, qkv_rope_store)


def _on_gpu(device: torch.device) -> Ops:
    from nanovllm.kernels.small_tile_triton import new_arrived

    arrived = new_arrived(device)  # one for the model: its products run one after the other
    return BY_DEVICE._replace(
        linear=partial(small_linear, arrived=arrived),
        rms_norm_linear=partial(rms_norm_linear, arrived=arrived),
        rms_norm_gated_linear=partial(rms_norm_gated_linear, arrived=arrived),
    )


def choose_ops(device: torch.device, compilation: str, is_deterministic: bool = False) -> Ops:
    """compilation, is_deterministic: as in `EngineConfig`, which allows it for "kernels" only.

    Raises ImportError if it needs the C++ kernels, which compute row by row, and they cannot be built: PyTorch's own
    operations treat the ends of a thread's share differently.
    """
    if is_deterministic:
        if device.type == "cpu" and load_native() is None:
            raise ImportError("deterministic=True needs a C++ compiler (c++, g++ or clang++) for the CPU kernels")
        ops = choose_ops(device, compilation)
        if device.type == "cuda":
            experts = partial(fused_experts, block_size=64)
        else:
            experts = partial(fused_experts_reference, linear=fixed_linear, gate=ops.silu_and_mul)
        return ops._replace(
            linear=fixed_linear,
            rms_norm_linear=None,
            rms_norm_gated_linear=None,
            fused_experts=experts,
            is_deterministic=True,
        )
    kernels = _on_gpu(device) if device.type == "cuda" else BY_DEVICE
    if device.type == "cpu" and compilation != "none":
        native = load_native()
        if native is not None:
            kernels = Ops(
                native.rms_norm,
                native.add_rms_norm,
                native.silu_and_mul,
                native.gelu_and_mul,
                native.qkv_rope_store,
            )
    if compilation == "kernels":
        return kernels
    store = kernels.qkv_rope_store
    if compilation == "none":
        return PLAIN._replace(qkv_rope_store=store if device.type == "cuda" else qkv_rope_store_reference)
    return Ops(
        torch.compile(rms_norm_reference, dynamic=True),
        torch.compile(add_rms_norm_reference, dynamic=True),
        torch.compile(silu_and_mul_reference, dynamic=True),
        torch.compile(gelu_and_mul_reference, dynamic=True),
        store,
    )
