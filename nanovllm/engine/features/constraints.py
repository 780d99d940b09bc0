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


def bitmasks(sampled: Sequence[Request]) -> dict[int, np.ndarray]:
    """As `SchedulerOutput.grammar_bitmask`, of the requests for which a step samples, some of which have one."""
    constrained = {request.row: request.constraint for request in sampled if request.constraint is not None}
    constraints = list(constrained.values())
    return dict(zip(constrained, constraints[0].bitmasks(constraints), strict=True))
