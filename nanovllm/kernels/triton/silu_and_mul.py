"""The gate of a feed-forward layer in Triton: SiLU or GELU, times up.

Owns how the gate runs on a GPU: elementwise, each input read once. Invariant: rounds exactly where the reference does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv

BLOCK = 1024


@triton.jit
def _silu_and_mul_kernel(
    x_ptr, out_ptr, x_stride, WIDTH: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < WIDTH
    gate = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0)
    up = tl.load(x_ptr + row * x_stride + WIDTH + col, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    slope = wide
    if GELU:  # (1 + tanh(z)) / 2 is the logistic function at 2 z
        slope = 1.5957691216057308 * (wide + 0.044715 * wide * wide * wide)
    active = (wide / (1.0 + tl.exp(-slope))).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + col, (active * up.to(tl.float32)).to(gate.dtype), mask=mask)


def silu_and_mul_triton(gate_up: Tensor, gelu: bool = False) -> Tensor:
    """See `silu_and_mul.silu_and_mul`, or `gelu_and_mul`; rows may be strided, the last dimension may not."""
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    if num_tokens:
        launch(
            _silu_and_mul_kernel, (num_tokens, cdiv(width, BLOCK)), gate_up.device,
            gate_up, out, gate_up.stride(0), WIDTH=width, GELU=gelu, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out
