"""How a SpeculativeConfig becomes a planner: the door of this room.

Owns the choice of parts. Invariant: nothing is planned or measured here.
"""

from collections.abc import Callable
from typing import Any

from nanovllm.engine.speculation.chained_scheduler import ChainedScheduler
from nanovllm.engine.speculation.draft_scheduler import DraftModelScheduler
from nanovllm.engine.speculation.pace import Pace
from nanovllm.engine.speculation.proposer import make_proposals
from nanovllm.engine.speculation.scheduler import SpeculativeScheduler
from nanovllm.speculative_config import MODEL_METHODS, SpeculativeConfig, num_unseen


def speculative_planner(
    config: SpeculativeConfig,
    vocab_size: int,
    clock: Callable[[], float] | None,
    is_captured: bool = False,
    most_requests: int | None = None,
) -> tuple[type[SpeculativeScheduler], dict[str, Any]]:
    """A Scheduler, and its arguments beside those of all schedulers. clock: as in `Pace`. is_captured: steps are, so
    that one can draft and verify. most_requests: as of `SpeculativeScheduler`, if not as in the config.
    """
    is_on_device = config.method in MODEL_METHODS
    parts: dict[str, Any] = {
        "proposals": None if is_on_device else make_proposals(config, vocab_size),
        "pace": Pace(config.num_speculative_tokens, clock, config.adaptive, can_compare=not is_on_device),
        "most_requests": config.disable_by_batch_size if most_requests is None else most_requests,
    }
    if not is_on_device:
        return SpeculativeScheduler, parts
    parts["reads_ahead"] = int(config.method != "draft_model")
    if not is_captured:
        return DraftModelScheduler, parts
    return ChainedScheduler, {**parts, "num_unseen": num_unseen(config)}
