"""HiddenStates: what leaves the decoder layers that a request asked for, on its way to the host.

Owns the hooks on the layers while a step runs, and which of the step's tokens are whose. Does not own who asks: that
stands in the plan. Invariant: hooks exist only during a forward pass that somebody captures, so everyone
else's steps, CUDA graphs included, are as if this file did not exist.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

Captured = Sequence[dict[int, Tensor]]  # for each request that captures, layer -> [its tokens in the step, hidden_size]


@contextmanager
def recorded_layers(model: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Inside, the result fills with the residual stream behind each of these decoder layers: [num_tokens, hidden_size].

    model.layers: modules that return (what the layer adds to the residual stream, the stream before that).
    """
    recorded: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, output: tuple[Tensor, Tensor]) -> None:
            recorded[layer] = output[0] + output[1]

        return hook

    handles = [model.layers[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def split_by_request(
    recorded: Mapping[int, Tensor], asked: Sequence[Sequence[int]], query_lens: Sequence[int]
) -> Captured:
    """asked: each request's layers, () for one that captures nothing; query_lens: its tokens in the step."""
    captured: list[dict[int, Tensor]] = []
    first = 0
    for layers, count in zip(asked, query_lens, strict=True):
        if layers:
            captured.append({layer: recorded[layer][first : first + count] for layer in layers})
        first += count
    return captured
