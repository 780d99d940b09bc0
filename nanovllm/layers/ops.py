"""Ops: the operations of a model's layers, and how their weights are held, as suits device and `compilation`.

Owns the choice, made once when a model is built and handed to its layers. Invariant: every form computes what the
references beside it define, up to rounding, so a model is written once and runs in all of them.

    compilation    norms and activation                      products on a GPU             rotation and KV store
    "kernels"      Triton on a GPU, C++ on a CPU             with norm and activation,     Triton or C++
                                                             for few rows
    "inductor"     the references, fused by torch.compile    PyTorch's                     as "kernels"
    "none"         the references, one PyTorch call each     PyTorch's                     as "kernels" on a GPU

On a CPU, products are oneDNN's in all of them, from weights that are packed for it; but float32 without AVX-512, where
"kernels" multiplies few rows in C++.

What stands around the layers (a step's inputs, rows of tables, attention, sampling) is the same in all of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.attention_types import AttentionShape, HeadInputs, LayerCache
from nanovllm.kernels.batch_invariant_linear import batch_invariant_linear, one_row_at_a_time
from nanovllm.kernels.causal_conv import short_conv
from nanovllm.kernels.cpu.cpu_kernels import load_cpu_kernels
from nanovllm.kernels.delta_net import delta_net
from nanovllm.kernels.kimi_delta import kimi_delta
from nanovllm.kernels.mamba2 import mamba2
from nanovllm.kernels.moe import fused_experts, fused_experts_reference
from nanovllm.kernels.qkv_rope_store import qkv_rope_store, qkv_rope_store_reference
from nanovllm.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from nanovllm.kernels.silu_and_mul import (
    gelu_and_mul,
    gelu_and_mul_reference,
    silu_and_mul,
    silu_and_mul_reference,
)
from nanovllm.layers.batch_invariant_linear import BatchInvariantLinear
from nanovllm.layers.fused_linear import FusedLinear
from nanovllm.layers.linear_method import DenseLinear, LinearMethod, LinearSpec
from nanovllm.layers.packed_linear import PackedLinear


class Ops(NamedTuple):
    """See the function of the same name in `kernels/` for each contract. linear_method: see `linear_method.py`.

    by_row(function, *tensors): function(*tensors), which computes each row, of the same number in all, by itself.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    silu_and_mul: Callable[[Tensor], Tensor]
    gelu_and_mul: Callable[[Tensor], Tensor]
    qkv_rope_store: Callable[[Tensor, HeadInputs, LayerCache, AttentionShape], Tensor]
    fused_experts: Callable[..., Tensor] = fused_experts
    linear_method: Callable[[LinearSpec], LinearMethod] = DenseLinear
    short_conv: Callable[..., Tensor] = short_conv
    delta_net: Callable[..., Tensor] = delta_net
    mamba2: Callable[..., Tensor] = mamba2
    kimi_delta: Callable[..., Tensor] = kimi_delta
    experts_method: Callable[..., Any] | None = None  # (spec, layer, names) -> how experts are held; None: dense
    by_row: Callable[..., Tensor] = lambda function, *tensors: function(*tensors)


PLAIN = Ops(
    rms_norm_reference,
    add_rms_norm_reference,
    silu_and_mul_reference,
    gelu_and_mul_reference,
    qkv_rope_store_reference,
)
BY_DEVICE = Ops(rms_norm, add_rms_norm, silu_and_mul, gelu_and_mul, qkv_rope_store)


def _on_gpu(device: torch.device, is_deterministic: bool) -> Ops:
    from nanovllm.kernels.triton.linear.skinny_gemm import new_semaphores

    semaphores = new_semaphores(device)  # one for the model: its products run one after the other
    return BY_DEVICE._replace(
        linear_method=partial(BatchInvariantLinear if is_deterministic else FusedLinear, semaphores=semaphores),
        delta_net=partial(delta_net, semaphores=semaphores),
        mamba2=partial(mamba2, semaphores=semaphores),
    )


def _on_cpu() -> Ops:
    native = load_cpu_kernels()
    if native is None:
        return BY_DEVICE._replace(linear_method=PackedLinear)
    return Ops(
        native.rms_norm,
        native.add_rms_norm,
        native.silu_and_mul,
        native.gelu_and_mul,
        native.qkv_rope_store,
        linear_method=lambda spec: PackedLinear(spec, native.skinny_linear if native.suits(spec.dtype) else F.linear),
        short_conv=native.short_conv,
        delta_net=native.delta_net,
        kimi_delta=native.kimi_delta,
        mamba2=native.mamba2,
    )


def choose_ops(device: torch.device, compilation: str, is_deterministic: bool = False) -> Ops:
    """compilation, is_deterministic: as in `EngineConfig`, which allows it for "kernels" only.

    Raises ImportError if it needs the C++ kernels, which compute row by row, and they cannot be built: PyTorch's own
    operations treat the ends of a thread's share differently.
    """
    if is_deterministic:
        if device.type == "cpu" and load_cpu_kernels() is None:
            raise ImportError("deterministic=True needs a C++ compiler (c++, g++ or clang++) for the CPU kernels")
        if device.type == "cuda":
            return _on_gpu(device, is_deterministic)._replace(
                delta_net=partial(delta_net, is_exact=True),
                mamba2=partial(mamba2, is_exact=True),
                kimi_delta=partial(kimi_delta, is_exact=True),
                fused_experts=partial(fused_experts, block_size=64),
            )
        ops = choose_ops(device, compilation)
        experts = partial(
            fused_experts_reference,
            linear=batch_invariant_linear,
            silu_and_mul=ops.silu_and_mul,
            gelu_and_mul=ops.gelu_and_mul,
        )
        return ops._replace(by_row=one_row_at_a_time, fused_experts=experts, linear_method=BatchInvariantLinear)
    is_on_cpu = device.type == "cpu"
    linear_method = PackedLinear if is_on_cpu else DenseLinear
    if compilation == "none":
        store = qkv_rope_store_reference if is_on_cpu else qkv_rope_store
        return PLAIN._replace(qkv_rope_store=store, linear_method=linear_method)
    kernels = _on_cpu() if is_on_cpu else _on_gpu(device, is_deterministic=False)
    if compilation == "kernels":
        return kernels
    return Ops(
        torch.compile(rms_norm_reference, dynamic=True),
        torch.compile(add_rms_norm_reference, dynamic=True),
        torch.compile(silu_and_mul_reference, dynamic=True),
        torch.compile(gelu_and_mul_reference, dynamic=True),
        kernels.qkv_rope_store,
        linear_method=linear_method,
    )
