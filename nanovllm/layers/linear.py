"""Linear layers whose weights are spread over tensor-parallel ranks (Shoeybi et al., 2019).

A column-parallel layer splits its outputs and needs no communication; a row-parallel one splits its inputs and sums the
ranks' results. A pair of them costs one all-reduce. Owns which part of which matrix a rank holds, the biases and the
communication. Invariant: a layer has a shape and a method (`linear_method.py`); only the method sees a weight.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.linear_method import Gate, LinearMethod, LinearSpec, Norm
from nanovllm.layers.ops import Ops
from nanovllm.layers.weight_specs import WeightSpec, WeightSpecs


class LinearBase(nn.Module):
    """y = x W^T + b on this rank's part: x [num_rows, inputs] -> [num_rows, outputs]."""

    takes_adapters = True  # of LoRA

    def __init__(self, spec: LinearSpec, bias: bool, ops: Ops) -> None:
        super().__init__()
        self.spec = spec
        self.make_method = ops.linear_method
        self.method: LinearMethod  # made by `weights`
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(spec.num_outputs, dtype=spec.dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.method.multiply(x, self.bias)

    def after_norm(self, norm: Norm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(forward(norm of x + residual), x + residual), in one kernel where the device has one."""
        return self.method.multiply_after_norm(norm, x, residual, self.bias)

    def weights(self, *names: str) -> WeightSpecs:
        """names: of the checkpoint's layers, in the order of `spec.sizes`.

        The first call makes the weights, on the current device: how they are held may depend on the names.
        """
        if not self.spec.names:
            self.spec = self.spec._replace(names=names)
            self.method = self.make_method(self.spec)
        for part, name in enumerate(self.spec.names):
            for suffix, weight_spec in self.method.weights(part):
                yield f"{name}.{suffix}", weight_spec._replace(layer=self)
            if self.bias is not None:
                yield f"{name}.bias", self._bias_spec(part, self.bias.data[self.spec.rows(part)])

    def _bias_spec(self, part: int, target: Tensor) -> WeightSpec:
        held = self.spec.parts[part]
        shape = (self.spec.sizes[part],)
        return WeightSpec(shape, lambda tensor: target.copy_(tensor[held.start : held.stop]), layer=self)

    def finish(self) -> None:
        """Called when the weights are in place."""
        self.method.finish()


class Linear(LinearBase):
    """Every rank holds all of it."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, ops: Ops) -> None:
        spec = LinearSpec((out_features,), (range(out_features),), in_features, range(in_features), dtype)
        super().__init__(spec, bias, ops)


class MergedColumnParallelLinear(LinearBase):
    """Several column-parallel layers with one input, computed as one product; `sizes` are their whole output sizes."""

    def __init__(
        self, in_features: int, sizes: Sequence[int], bias: bool, dtype: torch.dtype, tp: TensorParallel, ops: Ops
    ) -> None:
        parts = tuple(tp.part(size, "output size") for size in sizes)
        super().__init__(LinearSpec(tuple(sizes), parts, in_features, range(in_features), dtype), bias, ops)


class GatedLinear(MergedColumnParallelLinear):
    """Gate and up projection with the gate applied: x -> silu(gate) * up, [num_rows, size of one of them].

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
        self.gate = Gate(activation, {"silu": ops.silu_and_mul, "gelu_tanh": ops.gelu_and_mul}[activation])

    def forward(self, x: Tensor) -> Tensor:
        return self.gate.apply(super().forward(x))

    def after_norm(self, norm: Norm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.method.multiply_after_norm(norm, x, residual, self.bias, self.gate)


class QKVParallelLinear(LinearBase):
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
        parts = tuple(range(held.start * head_dim, held.stop * head_dim) for held in (heads, kv_heads, kv_heads))
        super().__init__(LinearSpec(sizes, parts, hidden_size, range(hidden_size), dtype), bias, ops)
        self.num_heads, self.num_kv_heads = len(heads), len(kv_heads)


class RowParallelLinear(LinearBase):
    """Splits the input features; the ranks' partial results are summed, and the bias is added once, by rank 0.

    What follows in a decoder is the residual addition and a norm, which may do the sum on the way (`summing_norm.py`).
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, tp: TensorParallel, ops: Ops
    ) -> None:
        inputs = tp.part(in_features, "input size")
        super().__init__(LinearSpec((out_features,), (range(out_features),), in_features, inputs, dtype), bias, ops)
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        product = super().forward(x)
        return product if self.tp.size == 1 else self.tp.all_reduce(product)

    def _bias_spec(self, part: int, target: Tensor) -> WeightSpec:
        if self.tp.rank == 0:
            return super()._bias_spec(part, target)
        return WeightSpec(tuple(target.shape), lambda tensor: target.zero_())
