"""The order in which a layer keeps the dimensions of its query and key heads, so that one rotation serves all families.

A checkpoint rotates dimensions i and i + rotary_dim / 2 together ("neox"), or neighbours, 2i and 2i + 1; the kernels
rotate i and i + head_dim / 2, all of them.

    checkpoint    [ a0 a1 | b0 b1 | c0 c1 c2 c3 ]        a, b: rotated        c: not rotated
         or       [ a0 b0 | a1 b1 | c0 c1 c2 c3 ]
    here          [ a0 a1   c0 c1 | b0 b1   c2 c3 ]      pairs (a0, b0), (a1, b1), and (c0, c2), (c1, c3) by 0

Owns the order and the loading into it. Invariant: queries, keys and the weights of their norms agree on it, and then
scores do not depend on it.
"""

import torch
from torch import Tensor

from nanovllm.config import RopeConfig
from nanovllm.layers.weight_specs import WeightSpec


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
    """The spec of a layer that keeps the rows of each head in another order: `order` [head_dim], on the CPU."""
    if order is None:
        return named
    name, spec = named
    if not spec.has_rows:
        raise NotImplementedError(f"{name}: heads whose rows are put in another order cannot be quantized in this form")

    def fill(tensor: Tensor) -> None:
        heads = tensor[:].unflatten(0, (-1, order.shape[0]))
        spec.fill(heads[:, order.to(heads.device)].flatten(0, 1))

    return name, spec._replace(fill=fill, place=None)
