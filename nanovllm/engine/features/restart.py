"""Requests after a step that was interrupted: what half of it did is taken back, and they begin anew.

Owns what a request forgets then; queues and blocks are the scheduler's and the cache manager's. Invariant: a request
keeps the tokens of steps that were wholly taken in, with what belongs to each, and nothing else.
"""

from collections.abc import Sequence

from nanovllm.engine.request import Request, RequestStatus
from nanovllm.engine.scheduler_output import SchedulerOutput


def take_back(sampled: Sequence[Request], plan: SchedulerOutput, block_size: int) -> None:
    """Undo what an interrupted update did to the requests for which this plan, the oldest in flight, samples."""
    counts = zip(plan.num_computed_tokens, plan.num_scheduled_tokens, plan.num_samples, strict=True)
    known = [start + count for start, count, num_samples in counts if num_samples]
    for request, num_tokens in zip(sampled, known, strict=True):
        del request.logprobs[max(0, num_tokens - request.num_prompt_tokens) :]
        if len(request.token_ids) <= num_tokens:
            continue  # it was not reached, had ended before, or has failed
        del request.token_ids[num_tokens:], request.block_hashes[num_tokens // block_size :]
        request.status = RequestStatus.WAITING
        request.finish_reason = request.stop_reason = request.error = None
        if request.rope_len > num_tokens:  # with this token its context had become a long one
            request.rope_len, request.recompute_from = request.num_prompt_tokens, num_tokens
            request.cache_salt, request.block_hashes = b"", []


def begin_anew(request: Request) -> None:
    """All KV of a request that goes on is computed again, and what is in flight for it will not come."""
    request.status = RequestStatus.WAITING
    request.num_computed_tokens = request.num_pending_tokens = request.num_published_blocks = 0
    request.num_scored_tokens = request.num_skipped_tokens + len(request.prompt_logprobs)
    request.num_captured_tokens = sum(len(next(iter(part.values()))) for part in request.hidden_states)
    if request.constraint is not None:
        request.constraint.restart(request.output_token_ids)
