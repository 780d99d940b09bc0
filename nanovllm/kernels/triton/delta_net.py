"""The gated delta net in Triton: decodes in one launch, prompts in chunks.

Owns how it runs on a GPU. Of a decode, a program has some columns of one head's matrix: it convolves, updates the
columns, which are read and written once, and asks them. Whoever is the last for a key head norms and gates what its
heads found, and moves on the convolution of their query and key. Prompts go through their matrices in chunks
(`delta_chunks.py`). Invariant: either way the state is that of all tokens, float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.delta_net import L2_EPS, DeltaNet
from nanovllm.kernels.state_types import LayerState, StepStates
from nanovllm.kernels.triton.causal_conv import advance, causal_conv_triton, convolved
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2
from nanovllm.kernels.triton.common.state_steps import behind_decodes, counters
from nanovllm.kernels.triton.delta_chunks import delta_chunks_triton
from nanovllm.kernels.triton.state_parts import softplus

COLUMNS = 32  # of a matrix: 128 bytes of a row


@triton.jit
def gates_of(ba_ptr, decay_ptr, dt_bias_ptr, head, HEADS: tl.constexpr):
    """alpha and beta of one token and head. ba_ptr: of the token."""
    b = tl.load(ba_ptr + head).to(tl.float32)
    a = softplus(tl.load(ba_ptr + HEADS + head).to(tl.float32) + tl.load(dt_bias_ptr + head))
    return tl.exp(-tl.load(decay_ptr + head) * a), 1.0 / (1.0 + tl.exp(-b))


@triton.jit
def _decode_kernel(
    qkvz_ptr,
    ba_ptr,
    conv_weight_ptr,
    decay_ptr,
    dt_bias_ptr,
    norm_ptr,
    conv_ptr,
    matrices_ptr,
    rows_ptr,
    starts_ptr,
    seq_lens_ptr,
    snapshots_ptr,
    found_ptr,
    counters_ptr,
    out_ptr,
    qkvz_stride,
    ba_stride,
    conv_stride,
    matrix_stride,
    eps,
    KEY_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    WIDTH: tl.constexpr,
    L2_EPS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    CHANNELS: tl.constexpr = 2 * KEY_HEADS * KEYS + HEADS * VALUES
    SHARED_BY: tl.constexpr = HEADS // KEY_HEADS
    request, head = tl.program_id(0), tl.program_id(1) // PARTS
    row = tl.load(rows_ptr + request).to(tl.int64)
    token = tl.load(starts_ptr + request).to(tl.int64)
    length = tl.load(starts_ptr + request + 1) - token
    key, column = tl.arange(0, BLOCK_KEYS), tl.program_id(1) % PARTS * COLUMNS + tl.arange(0, COLUMNS)
    is_key, is_column = key < KEYS, column < VALUES
    dtype = out_ptr.dtype.element_ty
    if (row < 0) | (length == 0):  # padding: what its tokens are must be numbers
        at = out_ptr + (token * HEADS + head) * VALUES + column
        tl.store(at, tl.zeros((COLUMNS,), dtype), mask=is_column & (length > 0))
        return
    had_tokens = tl.load(seq_lens_ptr + request) > 1
    snapshot = tl.load(snapshots_ptr + token).to(tl.int64)
    x, conv = qkvz_ptr + token * qkvz_stride, conv_ptr + row * conv_stride
    cell = (head * KEYS + key[:, None]) * VALUES + column[None, :]
    is_cell = is_key[:, None] & is_column[None, :]
    matrix = tl.load(matrices_ptr + row * matrix_stride + cell, mask=is_cell & had_tokens, other=0.0)
    key_head = head // SHARED_BY
    q_channel, k_channel = key_head * KEYS + key, (KEY_HEADS + key_head) * KEYS + key
    v_channel = 2 * KEY_HEADS * KEYS + head * VALUES + column
    q = convolved(x, conv_weight_ptr, None, conv, had_tokens, q_channel, is_key, CHANNELS, WIDTH, False)
    k = convolved(x, conv_weight_ptr, None, conv, had_tokens, k_channel, is_key, CHANNELS, WIDTH, False)
    v = convolved(x, conv_weight_ptr, None, conv, had_tokens, v_channel, is_column, CHANNELS, WIDTH, False)
    advance(x, conv_ptr, conv_stride, row, snapshot, had_tokens, v_channel, is_column, CHANNELS, WIDTH)
    q *= tl.rsqrt(tl.sum(q * q, 0) + L2_EPS) * (KEYS**-0.5)
    k *= tl.rsqrt(tl.sum(k * k, 0) + L2_EPS)
    alpha, beta = gates_of(ba_ptr + token * ba_stride, decay_ptr, dt_bias_ptr, head, HEADS)
    matrix *= alpha
    change = beta * (v - tl.sum(k[:, None] * matrix, 0))
    matrix += k[:, None] * change[None, :]
    tl.store(matrices_ptr + row * matrix_stride + cell, matrix, mask=is_cell)
    tl.store(matrices_ptr + snapshot * matrix_stride + cell, matrix, mask=is_cell & (snapshot >= 0))
    found_at = found_ptr + request * HEADS * VALUES
    tl.store(found_at + head * VALUES + column, tl.sum(q[:, None] * matrix, 0), mask=is_column)
    tl.debug_barrier()  # every warp's loads and stores come before the one thread's release
    counter = counters_ptr + request * KEY_HEADS + key_head
    if tl.atomic_add(counter, 1, sem="acq_rel") == SHARED_BY * PARTS - 1:
        tl.store(counter, 0)
        advance(x, conv_ptr, conv_stride, row, snapshot, had_tokens, q_channel, is_key, CHANNELS, WIDTH)
        advance(x, conv_ptr, conv_stride, row, snapshot, had_tokens, k_channel, is_key, CHANNELS, WIDTH)
        value = tl.arange(0, BLOCK_VALUES)
        is_value = value < VALUES
        weight = tl.load(norm_ptr + value, mask=is_value, other=0.0).to(tl.float32)
        for i in tl.static_range(SHARED_BY):
            at = (key_head * SHARED_BY + i) * VALUES + value
            # .cg reads past this multiprocessor's L1 cache.
            found = tl.load(found_at + at, mask=is_value, other=0.0, cache_modifier=".cg").to(dtype).to(tl.float32)
            normed = (found * tl.rsqrt(tl.sum(found * found, 0) / VALUES + eps)).to(dtype).to(tl.float32)
            normed = (normed * weight).to(dtype).to(tl.float32)
            z = tl.load(x + CHANNELS + at, mask=is_value, other=0.0).to(tl.float32)
            tl.store(
                out_ptr + token * HEADS * VALUES + at, (normed * (z / (1.0 + tl.exp(-z)))).to(dtype), mask=is_value
            )


def delta_net_triton(
    qkvz: Tensor,
    ba: Tensor,
    net: DeltaNet,
    state: LayerState,
    step: StepStates,
    is_exact: bool,
    semaphores: Tensor | None = None,
) -> Tensor:
    """See `delta_net.delta_net`."""
    num_decodes = 0 if is_exact else step.meta.num_decodes
    out = qkvz.new_empty(qkvz.shape[0], net.num_value_heads * net.value_dim)
    if num_decodes:
        _decode(qkvz, ba, net, state, step, num_decodes, out, semaphores)
    if num_decodes < step.meta.num_reqs and len(out):
        rest, channels = behind_decodes(step, num_decodes), net.conv_weight.shape[1]
        qkv = causal_conv_triton(qkvz[:, :channels], net.conv_weight, None, state.conv, rest, is_gated=False)
        delta_chunks_triton(qkv, qkvz[:, channels:], ba, net, state.matrices, rest, out, num_decodes, is_exact)
    return out


def _decode(
    qkvz: Tensor,
    ba: Tensor,
    net: DeltaNet,
    state: LayerState,
    step: StepStates,
    num_reqs: int,
    out: Tensor,
    semaphores: Tensor | None,
) -> None:
    columns = min(COLUMNS, next_power_of_2(net.value_dim))
    parts = cdiv(net.value_dim, columns)
    found = qkvz.new_empty(num_reqs, out.shape[1], dtype=torch.float32)
    launch(
        _decode_kernel, (num_reqs, net.num_value_heads * parts), qkvz.device,
        qkvz, ba, net.conv_weight, net.decay, net.dt_bias, net.norm_weight, state.conv, state.matrices,
        step.rows, step.meta.query_start_loc, step.meta.seq_lens, step.snapshots, found,
        counters(num_reqs * net.num_key_heads, qkvz.device, semaphores), out,
        qkvz.stride(0), ba.stride(0), state.conv.stride(0), state.matrices.stride(0), net.eps,
        KEY_HEADS=net.num_key_heads, HEADS=net.num_value_heads, KEYS=net.key_dim, VALUES=net.value_dim,
        WIDTH=net.conv_weight.shape[0], L2_EPS=L2_EPS, BLOCK_KEYS=next_power_of_2(net.key_dim),
        BLOCK_VALUES=next_power_of_2(net.value_dim), COLUMNS=columns, PARTS=parts, num_warps=4,
    )  # fmt: skip
