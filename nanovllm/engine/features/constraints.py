"""Forms that outputs must have (structured outputs), as the engine handles them.

Owns how a sequence gets its constraint, and what a plan says of those that sample; `structured/` knows the forms.
Invariant: each sequence has a constraint of its own, which has seen every token before the next is drawn.

Where the worker is a function call away, a step is queued before the tokens of the one ahead are known, as without
forms: nothing needs them until it samples. Then the worker asks for masks, while the device is still at the layers; the
engine reads those tokens, shows them to the constraints, and answers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np

from nanovllm.engine.interfaces import TokenConstraint
from nanovllm.engine.request import Request
from nanovllm.structured_outputs import StructuredOutputsParams

CompileConstraint = Callable[[StructuredOutputsParams, bool], TokenConstraint]  # of (params, ignore_eos)


def make_constraint(
    compile_constraint: CompileConstraint | None, form: StructuredOutputsParams, ignore_eos: bool, name: str
) -> TokenConstraint:
    """Raises ValueError for `name` if it cannot be."""
    if compile_constraint is None:
        raise ValueError(f"{name}: structured_outputs need a tokenizer; use skip_tokenizer_init=False")
    try:
        return compile_constraint(form, ignore_eos)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def draft_bitmasks(request: Request, draft: list[int], first: np.ndarray) -> np.ndarray:
    """What the request's form allows behind its tokens (`first`), and behind each token of its draft.

    [1 + len(draft), words]; the draft is cut, in place, before the first token that the form forbids or ends with.
    """
    constraint = request.constraint
    assert constraint is not None
    masks, num_taken = [first], 0
    for token_id in draft:
        if not (int(masks[-1][token_id // 32]) >> token_id % 32) & 1:
            break
        num_taken += 1
        is_complete = constraint.advance(token_id)
        if is_complete or constraint.error is not None:
            break
        masks.append(constraint.bitmasks([constraint])[0])
    if num_taken and not (constraint.error is None and constraint.retract(num_taken)):
        constraint.restart(request.output_token_ids)
    del draft[len(masks) - 1 :]
    return np.stack(masks)


def bitmasks(sampled: Sequence[Request]) -> dict[int, np.ndarray]:
    """As `SchedulerOutput.grammar_bitmask`, of the requests for which a step samples."""
    constrained = {request.row: request.constraint for request in sampled if request.constraint is not None}
    constraints = list(constrained.values())
    return dict(zip(constrained, constraints[0].bitmasks(constraints), strict=True)) if constraints else {}


def nothing() -> None:
    """Nobody is ahead of the host."""


class LateMasks(Mapping[int, np.ndarray]):
    """`bitmasks`, made when somebody first looks at them, once the host has caught up with the device."""

    def __init__(self, sampled: Sequence[Request], catch_up: Callable[[], object]) -> None:
        self._sampled, self._catch_up = list(sampled), catch_up

    @cached_property
    def _masks(self) -> dict[int, np.ndarray]:
        self._catch_up()
        return bitmasks([request for request in self._sampled if not request.is_finished])

    def __getitem__(self, row: int) -> np.ndarray:
        return self._masks[row]

    def __iter__(self) -> Iterator[int]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)


def masks_of(sampled: Sequence[Request], catch_up: Callable[[], object]) -> Mapping[int, np.ndarray]:
    """Late ones if some token is still on its way to the host."""
    is_late = any(request.num_pending_tokens > 1 for request in sampled if request.constraint is not None)
    return LateMasks(sampled, catch_up) if is_late else bitmasks(sampled)
