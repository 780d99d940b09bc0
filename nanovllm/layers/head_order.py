"""The order in which a layer keeps the dimensions of its query and key heads, so that one rotation serves all families.

A checkpoint rotates dimensions i and i + rotary_dim / 2 together ("neox"), or neighbours, 2i and 2i + 1; the kernels
rotate i and i + head_dim / 2, all of them.

    checkpoint    [ a0 a1 | b0 b1 | c0 c1 c2 c3 ]        a, b: rotated        c: not rotated
         or       [ a0 b0 | a1 b1 | c0 c1 c2 c3 ]
    here          [ a0 a1   c0 c1 | b0 b1   c2 c3 ]      pairs (a0, b0), (a1, b1), and (c0, c2), (c1, c3) by 0

Owns the order and the loading into it. Invariant: queries, keys and the weights of their norms agree on it, and then
scores do not depend on it.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nanovllm.layers.linear import LinearBase
from nanovllm.layers.linear_method import Gate, LinearMethod, Norm
from nanovllm.layers.weight_specs import WeightSpec
from nanovllm.model_config import RopeConfig


def halves_order(head_dim: int, rope: RopeConfig | None, is_neox_style: bool) -> Tensor | None:
    """Where the dimensions of a head here come from in the checkpoint. [head_dim]; None: from the same place."""
    if rope is None or (rope.share == 1 and is_neox_style):
        return None
    rotary_dim = int(head_dim * rope.share)
    rotated = torch.arange(rotary_dim, device="cpu")
    a, b = rotated.chunk(2) if is_neox_style else (rotated[::2], rotated[1::2])
    c, d = torch.arange(rotary_dim, head_dim, device="cpu").chunk(2)
    return torch.cat((a, c, b, d))


def reordered_spec(named: tuple[str, WeightSpec], order: Tensor | None) -> tuple[str, WeightSpec]:
    """The spec of a tensor whose rows are those of heads, for a layer that keeps them in `order`."""
    if order is None:
        return named
    name, spec = named

    def fill(tensor: Tensor) -> None:
        heads = tensor[:].unflatten(0, (-1, order.shape[0]))
        spec.fill(heads[:, order.to(heads.device)].flatten(0, 1))

    return name, spec._replace(fill=fill, place=None)


def reordered_specs(
    layer: LinearBase, named: Sequence[tuple[str, WeightSpec]], order: Tensor | None
) -> Sequence[tuple[str, WeightSpec]]:
    """The specs `named` of a layer of queries, keys and values (not reordered), so that its outputs come in `order`.

    Codes of quantized weights may lie in words of several rows, or share scales with them: then the rows stay where
    they are, and what they give is put in order after each product.
    """
    if order is None:
        return named
    sizes, values = dict(zip(layer.spec.names, layer.spec.sizes, strict=True)), layer.spec.names[2]
    by_layer = [(name.rpartition(".")[0], spec) for name, spec in named]
    if all(spec.outputs == 0 and spec.shape[0] == sizes[of] for of, spec in by_layer):
        pairs = zip(named, by_layer, strict=True)
        return [part if of == values else reordered_spec(part, order) for part, (of, _) in pairs]
    if not any(isinstance(method, ReorderedOutputs) for method in layer.method.modules()):
        layer.method = ReorderedOutputs(layer.method, order)
    return named


class ReorderedOutputs(LinearMethod):
    """Another method, whose outputs for queries and keys are put in order, head by head."""

    def __init__(self, method: LinearMethod, order: Tensor) -> None:
        super().__init__(method.spec)
        self.method = method
        self.frozen = method.frozen
        queries, keys, values = map(len, method.spec.parts)
        by_head = torch.arange(queries + keys, device="cpu").view(-1, order.shape[0])[:, order]
        rest = torch.arange(queries + keys, queries + keys + values, device="cpu")
        self.columns = torch.cat((by_head.flatten(), rest)).to(torch.get_default_device())

    def weights(self, part: int) -> Iterator[tuple[str, WeightSpec]]:
        return self.method.weights(part)

    def finish(self) -> None:
        self.method.finish()

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.method.multiply(x, bias)[:, self.columns]

    def multiply_after_norm(
        self, norm: Norm, x: Tensor, residual: Tensor | None, bias: Tensor | None, gate: Gate | None = None
    ) -> tuple[Tensor, Tensor]:
        product, total = self.method.multiply_after_norm(norm, x, residual, bias, gate)
        return product[:, self.columns], total
