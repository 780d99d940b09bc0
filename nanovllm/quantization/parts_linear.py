"""PartsLinear: matrices that are one product elsewhere (query, key, value; gate, up), here quantized in different ways.

Owns the split: each matrix has a method of its own. Invariant: the outputs of the parts, side by side.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from nanovllm.layers.linear_method import LinearMethod, LinearSpec
from nanovllm.layers.weight_specs import WeightSpec


class PartsLinear(LinearMethod):
    def __init__(self, spec: LinearSpec, methods: Sequence[Callable[[LinearSpec], LinearMethod]]) -> None:
        super().__init__(spec)
        whole = zip(spec.sizes, spec.parts, spec.names, methods, strict=True)
        self._methods = [
            method(spec._replace(sizes=(size,), parts=(part,), names=(name,))) for size, part, name, method in whole
        ]
        self.frozen = next((method.frozen for method in self._methods if method.frozen), None)
        self.parts = nn.ModuleList(self._methods)  # so that the weights are found

    def weights(self, part: int) -> Iterator[tuple[str, WeightSpec]]:
        yield from self._methods[part].weights(0)

    def finish(self) -> None:
        for method in self._methods:
            method.finish()

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        biases = [None if bias is None else bias[self.spec.rows(part)] for part in range(len(self._methods))]
        return torch.cat([m.multiply(x, own) for m, own in zip(self._methods, biases, strict=True)], dim=1)
