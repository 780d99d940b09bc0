"""Requests after a step that was interrupted: what half of it did is taken back, and they begin anew.

Owns what a request forgets then; queues and blocks are the scheduler's and the cache manager's. Invariant: a request
keeps the tokens of steps that were wholly taken in, with what belongs to each, and nothing else.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from nanovllm.engine.features.context_length import become_short
from nanovllm.engine.request import Request
from nanovllm.engine.scheduler_output import SchedulerOutput

if TYPE_CHECKING:
    from nanovllm.engine.scheduler import Scheduler


def take_back(sampled: Sequence[Request], plan: SchedulerOutput, block_size: int) -> None:
    """Undo what an interrupted update did to the requests for which this plan, the oldest in flight, samples."""
    counts = zip(plan.num_computed_tokens, plan.num_scheduled_tokens, plan.num_samples, strict=True)
    known = [start + count + 1 - num_samples for start, count, num_samples in counts if num_samples]  # without drafts
    for request, num_tokens in zip(sampled, known, strict=True):
        del request.logprobs[max(0, num_tokens - request.num_prompt_tokens) :]
        if len(request.token_ids) <= num_tokens:
            continue  # it was not reached, had ended before, or has failed
        del request.token_ids[num_tokens:], request.block_hashes[num_tokens // block_size :]
        request.end = None
        if request.context is not None:
            become_short(request, request.context, num_tokens)


def rewind(request: Request) -> None:
    """Back behind its prompt: of a request that holds nothing any more, as if it had never been queued."""
    del request.token_ids[request.num_prompt_tokens :]
    request.logprobs.clear()
    request.weights_versions.clear()
    request.end, request.num_cached_tokens, request.block_hashes = None, None, []
    if request.context is not None:
        become_short(request, request.context, request.num_prompt_tokens)
    if request.scoring is not None:
        request.scoring.logprobs.clear()
    if request.capture is not None:
        request.capture.states.clear()
    list(begin_anew([request]))


def preempt_all(scheduler: "Scheduler") -> None:
    """Between two steps: who runs waits again, in order, and computes all its KV anew. What they leave can be found."""
    scheduler._steady = None
    for request in reversed(list(scheduler.running)):
        scheduler._preempt(request)


def begin_anew(requests: Iterable[Request]) -> Iterator[Request]:
    """Those that go on, of requests that have lost rows and blocks: all their KV is computed again, and what is in
    flight for them will not come.
    """
    for request in requests:
        request.row, request.block_ids = -1, []
        if request.is_finished:
            continue
        request.num_computed_tokens = request.num_pending_tokens = request.num_published_blocks = 0
        for part in (request.scoring, request.capture):
            if part is not None:
                part.begin_anew()
        if request.constraint is not None:
            request.constraint.restart(request.output_token_ids)
        yield request
