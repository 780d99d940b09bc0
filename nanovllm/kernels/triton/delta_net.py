"""The gated delta net in Triton: token after token in one launch, and prompts in chunks.

Owns how it runs on a GPU. Tokens one after the other, as decodes are: a program has the heads of one key head of one
request, convolves, updates each matrix, which is read and written once, and norms. Prompts go through their matrices in
chunks (`delta_chunks.py`). Invariant: either way the state is that of all tokens, float32.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention_types import AttentionMetadata
from nanovllm.kernels.delta_net import L2_EPS, DeltaNet
from nanovllm.kernels.state_types import LayerState, StepStates
from nanovllm.kernels.triton.causal_conv import causal_conv_triton
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import next_power_of_2
from nanovllm.kernels.triton.delta_chunks import delta_chunks_triton

FEW = 4  # requests


@triton.jit
def convolved(x_ptr, weight_ptr, state_ptr, had_tokens, channel, mask, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """SiLU of the convolution of some channels of one token, and the state moved on by it.

    Several threads may have the same channel, so all of them have read an input before one writes in its place.
    """
    newest = tl.load(x_ptr + channel, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + (WIDTH - 1) * CHANNELS + channel, mask=mask, other=0.0)
    y = newest.to(tl.float32) * weight.to(tl.float32)
    for j in tl.static_range(WIDTH - 1):
        at = state_ptr + j * CHANNELS + channel
        older = tl.load(at, mask=mask & had_tokens, other=0.0)
        y += older * tl.load(weight_ptr + j * CHANNELS + channel, mask=mask, other=0.0).to(tl.float32)
        tl.debug_barrier()
        if j > 0:
            tl.store(at - CHANNELS, older, mask=mask)
    tl.store(state_ptr + (WIDTH - 2) * CHANNELS + channel, newest.to(tl.float32), mask=mask)
    return (y / (1.0 + tl.exp(-y))).to(newest.dtype).to(tl.float32)


@triton.jit
def copy_conv(state_ptr, to_ptr, channel, mask, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    for j in tl.static_range(WIDTH - 1):
        value = tl.load(state_ptr + j * CHANNELS + channel, mask=mask, other=0.0)
        tl.store(to_ptr + j * CHANNELS + channel, value, mask=mask)


@triton.jit
def _delta_steps_kernel(
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
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    CHANNELS: tl.constexpr = 2 * KEY_HEADS * KEYS + HEADS * VALUES
    SHARED_BY: tl.constexpr = HEADS // KEY_HEADS
    request, key_head = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows_ptr + request).to(tl.int64)
    start = tl.load(starts_ptr + request)
    end = tl.load(starts_ptr + request + 1)
    if row < 0:  # padding: what its tokens are must be numbers
        number = tl.arange(0, BLOCK_VALUES)
        for index in range(start, end):
            token = tl.zeros((), tl.int64) + index
            for i in range(SHARED_BY):
                at = out_ptr + (token * HEADS + key_head * SHARED_BY + i) * VALUES + number
                tl.store(at, tl.zeros((BLOCK_VALUES,), out_ptr.dtype.element_ty), mask=number < VALUES)
        return
    had_tokens = tl.load(seq_lens_ptr + request) > end - start
    key, value = tl.arange(0, BLOCK_KEYS), tl.arange(0, BLOCK_VALUES)
    is_key, is_value = key < KEYS, value < VALUES
    dtype = out_ptr.dtype.element_ty
    conv = conv_ptr + row * conv_stride
    for index in range(start, end):
        token = tl.zeros((), tl.int64) + index
        x = qkvz_ptr + token * qkvz_stride
        snapshot = tl.load(snapshots_ptr + token).to(tl.int64)
        q_channel, k_channel = key_head * KEYS + key, (KEY_HEADS + key_head) * KEYS + key
        q = convolved(x, conv_weight_ptr, conv, had_tokens, q_channel, is_key, CHANNELS, WIDTH)
        k = convolved(x, conv_weight_ptr, conv, had_tokens, k_channel, is_key, CHANNELS, WIDTH)
        q *= tl.rsqrt(tl.sum(q * q, 0) + L2_EPS) * (KEYS**-0.5)
        k *= tl.rsqrt(tl.sum(k * k, 0) + L2_EPS)
        if snapshot >= 0:
            copy_conv(conv, conv_ptr + snapshot * conv_stride, q_channel, is_key, CHANNELS, WIDTH)
            copy_conv(conv, conv_ptr + snapshot * conv_stride, k_channel, is_key, CHANNELS, WIDTH)
        for i in range(SHARED_BY):
            head = key_head * SHARED_BY + i
            gates = ba_ptr + token * ba_stride + head
            b = tl.load(gates).to(tl.float32)
            a = tl.load(gates + HEADS).to(tl.float32) + tl.load(dt_bias_ptr + head)
            softplus = tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(tl.minimum(a, 20.0))))
            alpha = tl.exp(-tl.load(decay_ptr + head) * softplus)
            beta = 1.0 / (1.0 + tl.exp(-b))
            squares = 0.0
            for first in range(0, VALUES, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                is_column = column < VALUES
                v_channel = 2 * KEY_HEADS * KEYS + head * VALUES + column
                v = convolved(x, conv_weight_ptr, conv, had_tokens, v_channel, is_column, CHANNELS, WIDTH)
                is_cell = is_key[:, None] & is_column[None, :]
                cell = (head * KEYS + key[:, None]) * VALUES + column[None, :]
                at = matrices_ptr + row * matrix_stride + cell
                matrix = alpha * tl.load(at, mask=is_cell & had_tokens, other=0.0)
                change = beta * (v - tl.sum(k[:, None] * matrix, 0))
                matrix += k[:, None] * change[None, :]
                tl.store(at, matrix, mask=is_cell)
                if snapshot >= 0:
                    copy_conv(conv, conv_ptr + snapshot * conv_stride, v_channel, is_column, CHANNELS, WIDTH)
                    tl.store(matrices_ptr + snapshot * matrix_stride + cell, matrix, mask=is_cell)
                found = tl.sum(q[:, None] * matrix, 0).to(dtype)
                squares += tl.sum(found.to(tl.float32) * found.to(tl.float32), 0)
                tl.store(out_ptr + (token * HEADS + head) * VALUES + column, found, mask=is_column)
            tl.debug_barrier()
            result = out_ptr + (token * HEADS + head) * VALUES + value
            found = tl.load(result, mask=is_value, other=0.0).to(tl.float32)
            normed = (found * tl.rsqrt(squares / VALUES + eps)).to(dtype).to(tl.float32)
            normed = (normed * tl.load(norm_ptr + value, mask=is_value, other=0.0).to(tl.float32)).to(dtype)
            z = tl.load(x + CHANNELS + head * VALUES + value, mask=is_value, other=0.0).to(tl.float32)
            y = normed.to(tl.float32) * (z / (1.0 + tl.exp(-z)))
            tl.debug_barrier()
            tl.store(result, y.to(dtype), mask=is_value)
        had_tokens = had_tokens | (token >= start)
        tl.debug_barrier()  # what this token wrote, other threads may read for the next one


def delta_net_triton(
    qkvz: Tensor, ba: Tensor, net: DeltaNet, state: LayerState, step: StepStates, is_exact: bool
) -> Tensor:
    """See `delta_net.delta_net`."""
    meta, num_tokens = step.meta, qkvz.shape[0]
    out = torch.empty((num_tokens, net.num_value_heads * net.value_dim), dtype=qkvz.dtype, device=qkvz.device)
    num_singles = meta.num_reqs if is_exact else meta.num_decodes
    if num_singles:
        _delta_steps(qkvz, ba, net, state, step, num_singles, out)
    if num_singles < meta.num_reqs:
        rest = StepStates(step.rows[num_singles:], step.snapshots, _others(meta, num_singles), step.layers)
        channels = net.conv_weight.shape[1]
        qkv = causal_conv_triton(qkvz[:, :channels], net.conv_weight, None, state.conv, rest, is_gated=False)
        delta_chunks_triton(qkv, qkvz[:, channels:], ba, net, state.matrices, rest, out, num_singles)
    return out


def _others(meta: AttentionMetadata, num_singles: int) -> AttentionMetadata:
    return replace(
        meta,
        query_start_loc=meta.query_start_loc[num_singles:],
        seq_lens=meta.seq_lens[num_singles:],
        num_decodes=0,
        num_reqs=meta.num_reqs - num_singles,
    )


def _delta_steps(
    qkvz: Tensor, ba: Tensor, net: DeltaNet, state: LayerState, step: StepStates, num_reqs: int, out: Tensor
) -> None:
    block_values = next_power_of_2(net.value_dim)
    # Few requests: the whole of a matrix at once. Many: less of it, so that a multiprocessor has several programs.
    columns = block_values if num_reqs <= FEW else min(block_values, 32)
    launch(
        _delta_steps_kernel, (num_reqs, net.num_key_heads), qkvz.device,
        qkvz, ba, net.conv_weight, net.decay, net.dt_bias, net.norm_weight, state.conv, state.matrices,
        step.rows, step.meta.query_start_loc, step.meta.seq_lens, step.snapshots, out,
        qkvz.stride(0), ba.stride(0), state.conv.stride(0), state.matrices.stride(0), net.eps,
        KEY_HEADS=net.num_key_heads, HEADS=net.num_value_heads, KEYS=net.key_dim, VALUES=net.value_dim,
        WIDTH=net.conv_weight.shape[0], L2_EPS=L2_EPS, BLOCK_KEYS=next_power_of_2(net.key_dim),
        BLOCK_VALUES=block_values, COLUMNS=columns, num_warps=8 if columns >= 64 else 4,
    )  # fmt: skip
