"""Copies of states in Triton.

Owns how they run on a GPU: a program for each part of each layer's state of each token, of which most have nothing to
do. Invariant: see `copy_states.py`.
"""

import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv

BLOCK = 8192


@triton.jit
def _copy_states_kernel(
    states_ptr,
    sources_ptr,
    targets_ptr,
    layer_stride,
    slot_stride,
    NUM_FLOATS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    target = tl.load(targets_ptr + tl.program_id(0)).to(tl.int64)
    if target >= 0:
        source = tl.load(sources_ptr + tl.program_id(0)).to(tl.int64)
        layer = states_ptr + tl.program_id(1).to(tl.int64) * layer_stride
        index = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        mask = index < NUM_FLOATS
        value = tl.load(layer + source * slot_stride + index, mask=mask)
        tl.store(layer + target * slot_stride + index, value, mask=mask)


def copy_states_triton(states: Tensor, sources: Tensor, targets: Tensor) -> None:
    """See `copy_states.copy_states`."""
    num_layers, _, num_floats = states.shape
    launch(
        _copy_states_kernel, (len(targets), num_layers, cdiv(num_floats, BLOCK)), states.device,
        states, sources, targets, states.stride(0), states.stride(1), NUM_FLOATS=num_floats, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
