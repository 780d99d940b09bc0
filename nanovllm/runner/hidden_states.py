"""HiddenStates: what leaves the decoder layers that requests asked for, on its way to the host.

Owns the hooks on the layers while a step runs, and which of the step's tokens are whose. Does not own who asks: that
stands in the plan. Invariant: hooks exist only during a forward pass that somebody captures, so everyone else's steps,
CUDA graphs included, are as if this file did not exist.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor

# For each request that captures, layer -> [its tokens in the step, hidden_size], in the model's dtype.
Captured = Sequence[dict[int | str, Tensor]]


@contextmanager
def captured_layers(
    model: Any,
    rows: Sequence[int],
    query_lens: Sequence[int],
    layers_of_row: Mapping[int, Sequence[int | str]],
    to_host: Callable[[Tensor], Tensor],
) -> Iterator[Captured]:
    """Inside, the result fills with the residual stream behind the layers, for those rows that name some.

    rows, query_lens: the step's requests, and the tokens of each. model.layers: modules that return (what the layer
    adds to the residual stream, the stream before that), or (the stream behind it, None). "norm" is model.norm, which
    returns (the stream normalized, anything). Each part goes to the host at once, so that the device holds what is
    behind one layer at a time.
    """
    captured: list[dict[int | str, Tensor]] = []
    parts: dict[int | str, list[tuple[dict[int | str, Tensor], slice]]] = {}  # per layer, whose
    first = 0
    for row, count in zip(rows, query_lens, strict=True):
        if row in layers_of_row:
            captured.append({})
            for layer in layers_of_row[row]:
                parts.setdefault(layer, []).append((captured[-1], slice(first, first + count)))
        first += count

    def keep(layer: int | str) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, output: tuple[Tensor, Tensor | None]) -> None:
            added, before = output
            for request, tokens in parts[layer]:
                states = added[tokens]
                request[layer] = to_host(states if layer == "norm" or before is None else states + before[tokens])

        return hook

    modules = {layer: model.norm if layer == "norm" else model.layers[layer] for layer in parts}
    handles = [module.register_forward_hook(keep(layer)) for layer, module in modules.items()]
    sums = getattr(model, "sums_in_norms", None)  # `layers/summing_norm.py`: a layer may return a part of a sum
    try:
        with nullcontext() if sums is None else sums.apart():
            yield captured
    finally:
        for handle in handles:
            handle.remove()
