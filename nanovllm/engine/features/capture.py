"""Hidden states that a request captures, as steps bring them.

Owns their order in the request; `runner/hidden_states.py` takes them out of the layers. Invariant: a token's states are
kept once, though a preempted request computes the token again.
"""

from collections.abc import Iterable
from typing import Any

from nanovllm.engine.request import Request
from nanovllm.engine.scheduler_output import ModelRunnerOutput

# Requests whose states a step brings, and from which of their tokens on.
Captured = list[tuple[Request, int]]


def take_hidden_states(captured: Captured, output: ModelRunnerOutput) -> None:
    for (request, start), states in zip(captured, output.hidden_states, strict=True):
        num_known = request.num_captured_tokens - start
        new = {layer: tokens[num_known:] for layer, tokens in states.items()}
        num_new = len(next(iter(new.values())))
        if num_new and not request.is_finished:
            request.hidden_states.append(new)
            request.num_captured_tokens += num_new


def hidden_states_of(request: Request, layers: Iterable[int | str]) -> dict[int | str, list[Any]]:
    """Layer -> parts in order, to be joined by whoever may know of tensors."""
    return {layer: [part[layer] for part in request.hidden_states] for layer in layers}
