"""CPU kernels in C++ of layers with a state: a part of `CpuKernels`.

Owns the checks between their tensors and raw pointers. Invariant: as of `CpuKernels`, what the C++ does not take goes
to the PyTorch operation of the same name.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nanovllm.kernels.causal_conv import conv_silu, short_conv
from nanovllm.kernels.delta_net import DeltaNet, delta_net
from nanovllm.kernels.kimi_delta import KimiDelta, kimi_delta
from nanovllm.kernels.mamba2 import Mamba2, mamba2
from nanovllm.kernels.state_types import LayerState, StepStates

_MAX_WIDTH, _MAX_KEY = 64, 256  # as in states.cpp


class StateKernels:
    _causal_conv: dict[torch.dtype, Callable[..., None]]
    _delta_net: dict[torch.dtype, Callable[..., None]]
    _kimi_delta: dict[torch.dtype, Callable[..., None]]
    _mamba2: dict[torch.dtype, Callable[..., None]]

    def short_conv(self, bcx: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, step: StepStates) -> Tensor:
        """See `kernels.causal_conv.short_conv`."""
        out = self._convolve(bcx, weight, bias, state, step, is_gated=True)
        return short_conv(bcx, weight, bias, state, step) if out is None else out

    def conv_silu(self, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, step: StepStates) -> Tensor:
        """See `kernels.causal_conv.conv_silu`."""
        out = self._convolve(x, weight, bias, state, step, is_gated=False)
        return conv_silu(x, weight, bias, state, step) if out is None else out

    def delta_net(self, qkvz: Tensor, ba: Tensor, net: DeltaNet, state: LayerState, step: StepStates) -> Tensor:
        """See `kernels.delta_net.delta_net`."""
        num_tokens, channels = qkvz.shape[0], net.conv_weight.shape[1]
        heads, values, keys, dtype = net.num_value_heads, net.value_dim, net.key_dim, qkvz.dtype
        run = self._delta_net.get(dtype)
        if run is None or not (
            qkvz.stride(1) == 1
            and qkvz.shape[1] == channels + heads * values
            and keys <= _MAX_KEY
            and _is_dense(ba, (num_tokens, 2 * heads), dtype)
            and _is_dense(net.decay, (heads,), torch.float32)
            and _is_dense(net.dt_bias, (heads,), torch.float32)
            and _is_dense(net.norm_weight, (values,), dtype)
            and is_state(state.matrices, (heads, keys, values))
            and is_step(step, num_tokens)
        ):
            return delta_net(qkvz, ba, net, state, step)
        qkv = self.conv_silu(qkvz[:, :channels], net.conv_weight, None, state.conv, step)
        z, scratch = qkvz[:, channels:], torch.empty(num_tokens, heads * values)
        out = torch.empty_like(scratch, dtype=dtype)
        tensors = (
            *(qkv, z, ba, net.decay, net.dt_bias, net.norm_weight, state.matrices, step.rows),
            *(step.meta.query_start_loc, step.meta.seq_lens, step.snapshots, scratch, out),
        )
        run(
            *(tensor.data_ptr() for tensor in tensors),
            len(step.rows), net.num_key_heads, heads, keys, values,
            qkv.stride(0), z.stride(0), state.matrices.stride(0), net.eps,
        )  # fmt: skip
        return out

    def kimi_delta(
        self, qkv: Tensor, f: Tensor, b: Tensor, z: Tensor, net: KimiDelta, state: LayerState, step: StepStates
    ) -> Tensor:
        """See `kernels.kimi_delta.kimi_delta`."""
        num_tokens, heads, dim, dtype = qkv.shape[0], net.num_heads, net.head_dim, qkv.dtype
        run, values = self._kimi_delta.get(dtype), heads * dim
        widths = (qkv, 3 * values), (f, values), (b, heads), (z, values)
        if run is None or not (
            all(x.stride(1) == 1 and x.dtype == dtype and x.shape == (num_tokens, width) for x, width in widths)
            and dim <= _MAX_KEY
            and _is_dense(net.decay, (heads,), torch.float32)
            and _is_dense(net.dt_bias, (values,), torch.float32)
            and _is_dense(net.norm_weight, (dim,), dtype)
            and is_state(state.matrices, (heads, dim, dim))
            and is_step(step, num_tokens)
        ):
            return kimi_delta(qkv, f, b, z, net, state, step)
        mixed = self.conv_silu(qkv, net.conv_weight, None, state.conv, step)
        alpha, scratch = torch.empty(2, num_tokens, values)
        out = qkv.new_empty(num_tokens, values)
        tensors = (
            *(mixed, f, b, z, net.decay, net.dt_bias, net.norm_weight, state.matrices, step.rows),
            *(step.meta.query_start_loc, step.meta.seq_lens, step.snapshots, alpha, scratch, out),
        )
        run(
            *(tensor.data_ptr() for tensor in tensors),
            len(step.rows), heads, dim, *(x.stride(0) for x in (mixed, f, b, z, state.matrices)), net.eps,
        )  # fmt: skip
        return out

    def mamba2(self, zxbcdt: Tensor, net: Mamba2, state: LayerState, step: StepStates) -> Tensor:
        """See `kernels.mamba2.mamba2`."""
        num_tokens, channels, values = zxbcdt.shape[0], net.conv_weight.shape[1], net.num_values
        heads, dtype, norm = net.num_heads, zxbcdt.dtype, net.norm_weight
        run = self._mamba2.get(dtype)
        if run is None or not (
            zxbcdt.stride(1) == 1
            and zxbcdt.shape[1] == values + channels + heads
            and net.state_dim <= _MAX_KEY
            and all(_is_dense(x, (heads,), torch.float32) for x in (net.decay, net.dt_bias, net.skip))
            and (norm is None or _is_dense(norm, (values,), dtype))
            and is_state(state.matrices, (heads, net.state_dim, net.head_dim))
            and is_step(step, num_tokens)
        ):
            return mamba2(zxbcdt, net, state, step)
        xbc = zxbcdt[:, values : values + channels]
        mixed = self.conv_silu(xbc, net.conv_weight, net.conv_bias, state.conv, step)
        gated, out = torch.empty(num_tokens, values), zxbcdt.new_empty(num_tokens, values)
        run(
            mixed.data_ptr(), zxbcdt.data_ptr(), net.decay.data_ptr(), net.dt_bias.data_ptr(), net.skip.data_ptr(),
            None if norm is None else norm.data_ptr(), state.matrices.data_ptr(), step.rows.data_ptr(),
            step.meta.query_start_loc.data_ptr(), step.meta.seq_lens.data_ptr(), step.snapshots.data_ptr(),
            gated.data_ptr(), out.data_ptr(),
            len(step.rows), net.num_groups, heads, net.state_dim, net.head_dim,
            mixed.stride(0), zxbcdt.stride(0), state.matrices.stride(0), net.eps,
        )  # fmt: skip
        return out

    def _convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, step: StepStates, *, is_gated: bool
    ) -> Tensor | None:
        (num_tokens, num_inputs), (width, channels) = x.shape, weight.shape
        run = self._causal_conv.get(x.dtype)
        if run is None or not (
            x.stride(1) == 1
            and num_inputs == channels * (3 if is_gated else 1)
            and 2 <= width <= _MAX_WIDTH
            and _is_dense(weight, (width, channels), x.dtype)
            and (bias is None or _is_dense(bias, (channels,), x.dtype))
            and is_state(state, (width - 1, channels))
            and is_step(step, num_tokens)
        ):
            return None
        out = x.new_empty(num_tokens, channels)
        run(
            x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), state.data_ptr(),
            step.rows.data_ptr(), step.meta.query_start_loc.data_ptr(), step.meta.seq_lens.data_ptr(),
            step.snapshots.data_ptr(), out.data_ptr(),
            len(step.rows), channels, width, x.stride(0), state.stride(0), is_gated,
        )  # fmt: skip
        return out


def is_state(state: Tensor, shape: tuple[int, ...]) -> bool:
    return state.dtype == torch.float32 and tuple(state.shape[1:]) == shape and state[0].is_contiguous()


def is_step(step: StepStates, num_tokens: int) -> bool:
    n, meta = len(step.rows), step.meta
    parts = (step.rows, n), (meta.query_start_loc, n + 1), (meta.seq_lens, n), (step.snapshots, num_tokens)
    return all(_is_dense(part, (size,), torch.int32) for part, size in parts)


def _is_dense(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    return x.dtype == dtype and tuple(x.shape) == shape and x.is_contiguous()
