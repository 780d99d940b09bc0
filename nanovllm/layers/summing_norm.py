"""SummingNorm: a norm that also adds up what the ranks have, where layers would sum first and norm then.

Owns the change of a loaded model: row-parallel products leave their parts, and the norms behind them take these.
Invariant: whoever looks at what a layer returns (`SumsInNorms.apart`) sees sums, as without this file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.linear import LinearBase, RowParallelLinear
from nanovllm.layers.linear_method import DenseLinear
from nanovllm.layers.norm import NoNorm, RMSNorm
from nanovllm.layers.weight_specs import WeightSpecs


class Parts(TensorParallel):
    """Of a layer whose sum somebody else takes."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x


class SummingNorm(nn.Module):
    """norm: RMSNorm. behind: the layer that multiplies what comes out, if one does."""

    weight = None  # no product takes this norm in

    def __init__(self, norm: RMSNorm, tp: TensorParallel, behind: LinearBase | None) -> None:
        super().__init__()
        self.norm, self.eps = norm, norm.eps
        self.is_apart = False
        self._tp = tp
        method = None if behind is None else behind.method
        self._next_weight = method.weight if isinstance(method, DenseLinear) else None

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x: this rank's part. Returns (norm of sum + residual, sum + residual); the second may be for this rank's next
        norm alone."""
        if self.is_apart:
            return self.norm(x, residual)  # type: ignore[no-any-return]
        sum_norm = self._tp.sum_norm
        if sum_norm is not None and sum_norm.takes(x):
            return sum_norm(x, residual, self.norm.weight, self.eps, self._next_weight)
        return self.norm(self._tp.all_reduce(x), residual)  # type: ignore[no-any-return]

    def weights(self, name: str) -> WeightSpecs:
        return self.norm.weights(name)


class SumsInNorms:
    """Of a model whose layers sum twice and norm each sum: those of one decoder (`models/llama.py`)."""

    def __init__(self, model: Any, tp: TensorParallel) -> None:
        self._tp, self._parts = tp, Parts(tp.rank, tp.size)
        self._products: list[RowParallelLinear] = []
        self._norms: list[SummingNorm] = []
        layers = list(model.layers)
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            layer.before_mlp = self._behind(layer.self_attn.o_proj, layer.before_mlp, layer.mlp.gate_up_proj)
            if following is None:
                model.norm = self._behind(layer.mlp.down_proj, model.norm, None)
            else:
                following.before_attention = self._behind(
                    layer.mlp.down_proj, following.before_attention, following.self_attn.qkv_proj
                )
        model.sums_in_norms = self

    def _behind(self, product: RowParallelLinear, norm: RMSNorm, behind: LinearBase | None) -> SummingNorm:
        product.tp = self._parts
        self._products.append(product)
        self._norms.append(SummingNorm(norm, self._tp, behind))
        return self._norms[-1]

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, products sum and norms only norm."""
        self._set(self._tp, True)
        try:
            yield
        finally:
            self._set(self._parts, False)

    def _set(self, tp: TensorParallel, is_apart: bool) -> None:
        for product, norm in zip(self._products, self._norms, strict=True):
            product.tp, norm.is_apart = tp, is_apart


def put_sums_into_norms(model: Any, tp: TensorParallel) -> None:
    """model: loaded. Families with another order of norms, sums and additions stay as they are."""
    if all(map(_is_standard, model.layers)) and type(model.norm) is RMSNorm:
        SumsInNorms(model, tp)


def _is_standard(layer: Any) -> bool:
    return (
        hasattr(layer, "is_parallel")  # else it is not of that decoder
        and not layer.is_parallel
        and layer.residual_scale == 1.0
        and type(layer.before_attention) is type(layer.before_mlp) is RMSNorm
        and isinstance(layer.after_attention, NoNorm)
        and isinstance(layer.after_mlp, NoNorm)
        and type(getattr(layer.self_attn, "o_proj", None)) is RowParallelLinear
        and type(getattr(layer.mlp, "down_proj", None)) is RowParallelLinear
        and hasattr(layer.mlp, "gate_up_proj")
        and hasattr(layer.self_attn, "qkv_proj")
    )
