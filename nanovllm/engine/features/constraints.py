"""Forms that outputs must have (structured outputs), as the engine handles them.

Owns how a sequence gets its constraint, and what a plan says of those that sample; `structured/` knows the forms.
Invariant: each sequence has a constraint of its own, which has seen every token before the next is planned.
"""

from collections.abc import Callable, Sequence

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
    """As `SchedulerOutput.grammar_bitmask`, of the requests for which a step samples, some of which have one."""
    constrained = {request.row: request.constraint for request in sampled if request.constraint is not None}
    constraints = list(constrained.values())
    return dict(zip(constrained, constraints[0].bitmasks(constraints), strict=True))
