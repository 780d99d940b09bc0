"""Causal convolutions with a state in Triton: gated input and output, or SiLU behind.

Owns how they run on a GPU: a program takes some channels of BLOCK_TOKENS tokens of one request, however many steps its
prompt is cut into. Invariant: the slot of a request's row is read and written by the program of its first tokens alone,
which first reads all that it needs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.state_types import StepStates
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2

BLOCK_TOKENS = 32


@triton.jit
def conv_input(x_ptr, position, channel, x_stride, mask, CHANNELS: tl.constexpr, GATED: tl.constexpr):
    """What is convolved, float32: a channel of x, or b * x, rounded as the reference rounds it."""
    at = x_ptr + position * x_stride + channel
    if GATED:
        b = tl.load(at, mask=mask, other=0.0)
        x = tl.load(at + 2 * CHANNELS, mask=mask, other=0.0)
        return (b.to(tl.float32) * x.to(tl.float32)).to(b.dtype).to(tl.float32)
    else:
        return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def convolved(
    x_ptr, weight_ptr, bias_ptr, state_ptr, had_tokens, channel, mask,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """SiLU of the convolution of some channels of one token, float32, rounded as the reference rounds it."""
    newest = tl.load(x_ptr + channel, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + (WIDTH - 1) * CHANNELS + channel, mask=mask, other=0.0)
    y = newest.to(tl.float32) * weight.to(tl.float32)
    for j in tl.static_range(WIDTH - 1):
        older = tl.load(state_ptr + j * CHANNELS + channel, mask=mask & had_tokens, other=0.0)
        y += older * tl.load(weight_ptr + j * CHANNELS + channel, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    return (y / (1.0 + tl.exp(-y))).to(newest.dtype).to(tl.float32)


@triton.jit
def advance(
    x_ptr, state_ptr, slot_stride, row, snapshot, had_tokens, channel, mask,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Move the state of some channels of a row on by one token, and copy it if there is a snapshot to fill.

    Several threads may have the same channel, so all of them have read before one writes.
    """
    own = state_ptr + row * slot_stride + channel
    inputs = (tl.load(x_ptr + channel, mask=mask, other=0.0).to(tl.float32),)  # newest first
    for j in tl.static_range(WIDTH - 2, 0, -1):
        inputs += (tl.load(own + j * CHANNELS, mask=mask & had_tokens, other=0.0),)  # type: ignore[assignment]
    tl.debug_barrier()
    for j in tl.static_range(WIDTH - 1):
        tl.store(own + j * CHANNELS, inputs[WIDTH - 2 - j], mask=mask)
        kept = state_ptr + snapshot * slot_stride + channel + j * CHANNELS
        tl.store(kept, inputs[WIDTH - 2 - j], mask=mask & (snapshot >= 0))


@triton.jit(do_not_specialize=["num_tiles"])
def _causal_conv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    rows_ptr,
    starts_ptr,
    seq_lens_ptr,
    snapshots_ptr,
    out_ptr,
    num_tiles,
    x_stride,
    slot_stride,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    request, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    row = tl.load(rows_ptr + request)
    start = tl.load(starts_ptr + request)
    length = tl.load(starts_ptr + request + 1) - start
    if tile * BLOCK_TOKENS >= length:
        return
    had_tokens = tl.load(seq_lens_ptr + request) > length
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_channel = channel < CHANNELS
    offset = tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)  # in the request's part of the step
    is_token = offset < length
    position = (start + offset).to(tl.int64)
    here = is_token[:, None] & is_channel[None, :]
    own_state = state_ptr + row.to(tl.int64) * slot_stride
    snapshot = tl.load(snapshots_ptr + position, mask=is_token, other=-1).to(tl.int64)
    is_kept = (snapshot >= 0)[:, None] & here
    y = tl.zeros((BLOCK_TOKENS, BLOCK_CHANNELS), tl.float32)
    for j in tl.static_range(WIDTH):
        at = offset - (WIDTH - 1 - j)
        inside = here & (at >= 0)[:, None]
        value = conv_input(
            x_ptr, (start + at).to(tl.int64)[:, None], channel[None, :], x_stride, inside, CHANNELS, GATED
        )
        before = here & (at < 0)[:, None] & had_tokens
        value += tl.load(own_state + (WIDTH - 1 + at)[:, None] * CHANNELS + channel[None, :], mask=before, other=0.0)
        weight = tl.load(weight_ptr + j * CHANNELS + channel, mask=is_channel, other=0.0).to(tl.float32)
        y += value * weight[None, :]
        if j > 0:
            kept_at = state_ptr + snapshot[:, None] * slot_stride + (j - 1) * CHANNELS + channel[None, :]
            tl.store(kept_at, value, mask=is_kept)
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    dtype = out_ptr.dtype.element_ty
    if GATED:
        c = tl.load(x_ptr + position[:, None] * x_stride + CHANNELS + channel[None, :], mask=here, other=0.0)
        y = y.to(dtype).to(tl.float32) * c.to(tl.float32)
    else:
        y = y / (1.0 + tl.exp(-y))
    y = tl.where(row >= 0, y, 0.0)  # padding: what its tokens are must be numbers
    tl.store(out_ptr + position[:, None] * CHANNELS + channel[None, :], y.to(dtype), mask=here)
    if tile == 0 and row >= 0:
        tl.debug_barrier()  # other threads of the program read the row's state, too
        for j in tl.static_range(WIDTH - 1):  # oldest first: what is read here has not been written
            source = length - (WIDTH - 1) + j
            old = tl.load(
                own_state + (WIDTH - 1 + source) * CHANNELS + channel,
                mask=is_channel & (source < 0) & had_tokens,
                other=0.0,
            )
            new = conv_input(
                x_ptr, (start + source).to(tl.int64), channel, x_stride, is_channel & (source >= 0), CHANNELS, GATED
            )
            tl.debug_barrier()  # several threads may have the same channel
            tl.store(own_state + j * CHANNELS + channel, old + new, mask=is_channel)


def causal_conv_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, step: StepStates, *, is_gated: bool
) -> Tensor:
    """See `causal_conv.short_conv` and, with is_gated False, `conv_silu`."""
    width, channels = weight.shape
    meta, num_tokens = step.meta, x.shape[0]
    out = torch.empty((num_tokens, channels), dtype=x.dtype, device=x.device)
    num_tiles = cdiv(meta.max_query_len, BLOCK_TOKENS)
    is_decode = meta.max_query_len == 1
    block_channels = min(next_power_of_2(channels), 256 if is_decode else 64)
    if num_tokens:
        launch(
            _causal_conv_kernel, (meta.num_reqs * num_tiles, cdiv(channels, block_channels)), x.device,
            x, weight, bias, state, step.rows, meta.query_start_loc, meta.seq_lens, step.snapshots, out,
            num_tiles, x.stride(0), state.stride(0),
            CHANNELS=channels, WIDTH=width, GATED=is_gated, HAS_BIAS=bias is not None,
            BLOCK_TOKENS=1 if is_decode else BLOCK_TOKENS, BLOCK_CHANNELS=block_channels,
            num_warps=2 if is_decode else 4,
        )  # fmt: skip
    return out
