"""Linear layers whose weights are spread over tensor-parallel ranks (Shoeybi et al., 2019).

A column-parallel layer splits its outputs and needs no communication; a row-parallel one splits its inputs and sums the
ranks' results. A pair of them costs one all-reduce. Owns weights and how a checkpoint's tensors map to them. Invariant:
after loading, `forward` reads the weights through `multiply` only, so a layer can be given another form of them.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.fixed_linear import in_tiles
from nanovllm.kernels.ops import Ops
from nanovllm.layers.norm import NoNorm, RMSNorm
from nanovllm.layers.packed_linear import pack_linear
from nanovllm.layers.slots import Slots, WeightSlot


class Linear(nn.Module):
    """y = x W^T + b on this rank's part: x [num_tokens, in_features] -> [num_tokens, out_features]."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None
        self.multiply: Callable[[Tensor], Tensor] = self._multiply

    def _multiply(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x)

    def after_norm(self, norm: RMSNorm | NoNorm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(forward(norm of x + residual), x + residual), in one kernel where the device has one."""
        if self.ops.rms_norm_linear is None or norm.weight is None:
            x, total = norm(x, residual)
            return self(x), total
        return self.ops.rms_norm_linear(x, residual, norm.weight, norm.eps, self.weight, self.bias)

    def optimize(self) -> None:
        """Called once when the weights are in place: on a CPU, lay them out as its matrix kernels want them."""
        packed = pack_linear(self.weight, self.bias)
        if packed is not None:
            self.multiply = partial(in_tiles, packed) if self.ops.is_deterministic else packed
            self.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # frees the plain copy


class MergedColumnParallelLinear(Linear):
    """Several column-parallel layers with one input, computed as one product; `sizes` are their whole output sizes."""

    def __init__(
        self, in_features: int, sizes: Sequence[int], bias: bool, dtype: torch.dtype, tp: TensorParallel, ops: Ops
    ) -> None:
        self._init_parts(in_features, sizes, [tp.part(size, "output size") for size in sizes], bias, dtype, ops)

    def _init_parts(
        self, in_features: int, sizes: Sequence[int], parts: Sequence[range], bias: bool, dtype: torch.dtype, ops: Ops
    ) -> None:
        """parts: which outputs of each layer this rank holds."""
        super().__init__(in_features, sum(map(len, parts)), bias, dtype, ops)
        self.sizes = tuple(sizes)
        self.parts = tuple(parts)

    def slots(self, *names: str) -> Slots:
        """names: the checkpoint's layer names, in the order of `sizes`."""
        offset = 0
        for name, size, part in zip(names, self.sizes, self.parts, strict=True):
            for suffix, parameter in (("weight", self.weight), ("bias", self.bias)):
                if parameter is not None:
                    target = parameter.data[offset : offset + len(part)]
                    yield f"{name}.{suffix}", WeightSlot((size, *parameter.shape[1:]), _filler(target, part))
            offset += len(part)


def _filler(target: Tensor, part: range) -> Callable[[Tensor], object]:
    return lambda tensor: target.copy_(tensor[part.start : part.stop])


class GatedLinear(MergedColumnParallelLinear):
    """Gate and up projection with the gate applied: x -> silu(gate) * up, [num_tokens, size of one of them].

    activation: "silu" or "gelu_tanh".
    """

    def __init__(
        self,
        in_features: int,
        sizes: Sequence[int],
        bias: bool,
        dtype: torch.dtype,
        tp: TensorParallel,
        ops: Ops,
        activation: str = "silu",
    ) -> None:
        super().__init__(in_features, sizes, bias, dtype, tp, ops)
        self.activation = activation
        self.gate = {"silu": ops.silu_and_mul, "gelu_tanh": ops.gelu_and_mul}[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.multiply(x))

    def after_norm(self, norm: RMSNorm | NoNorm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `Linear.after_norm`."""
        if self.ops.rms_norm_gated_linear is None or norm.weight is None:
            x, total = norm(x, residual)
            return self(x), total
        return self.ops.rms_norm_gated_linear(
            x, residual, norm.weight, norm.eps, self.weight, self.bias, self.activation
        )


class QKVParallelLinear(MergedColumnParallelLinear):
    """The query, key and value projections as one; heads are spread over the ranks.

    Ranks that share a key/value head each hold a copy of it.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        bias: bool,
        dtype: torch.dtype,
        tp: TensorParallel,
        ops: Ops,
    ) -> None:
        heads, kv_heads = tp.part(num_heads, "num_attention_heads"), tp.kv_heads(num_kv_heads)
        sizes = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
        parts = [range(held.start * head_dim, held.stop * head_dim) for held in (heads, kv_heads, kv_heads)]
        self._init_parts(hidden_size, sizes, parts, bias, dtype, ops)
        self.num_heads, self.num_kv_heads = len(heads), len(kv_heads)


class RowParallelLinear(Linear):
    """Splits the input features; the ranks' partial results are summed, and the bias is added once, by rank 0.

    What follows in a decoder is the residual addition and a norm: `after_norm` of the next layer. A kernel that does
    the sum on the way would take its place in these two.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, tp: TensorParallel, ops: Ops
    ) -> None:
        super().__init__(tp.shard(in_features, "input size"), out_features, bias, dtype, ops)
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        return self.tp.all_reduce(self.multiply(x))

    def slots(self, name: str) -> Slots:
        weight, first = self.weight.data, self.tp.rank * self.weight.shape[1]
        last = first + weight.shape[1]
        shape = (weight.shape[0], weight.shape[1] * self.tp.size)
        yield f"{name}.weight", WeightSlot(shape, lambda tensor: weight.copy_(tensor[:, first:last]))
        if self.bias is not None:
            bias = self.bias.data
            fill = bias.copy_ if self.tp.rank == 0 else lambda tensor: bias.zero_()
            yield f"{name}.bias", WeightSlot(tuple(bias.shape), fill)
