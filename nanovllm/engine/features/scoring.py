"""Prompt log-probabilities: which tokens of a prompt a step scores, and what it brings.

Owns the count of what is scored, in the request; the numbers are the runner's. Invariant: each token of a prompt but
the first is asked for once, preempted or not; of the n sequences of a prompt the first one asks.
"""

from nanovllm.engine.request import Request
from nanovllm.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput


def num_unscored_tokens(request: Request) -> int:
    """Prompt tokens whose log-probability is asked for and not on its way."""
    if request.params.prompt_logprobs is None or request.index > 0:
        return 0
    return request.num_prompt_tokens - 1 - request.num_scored_tokens


def plan_scores(plan: SchedulerOutput, request: Request, end: int) -> bool:
    """Ask for what is not known of the prompt tokens up to the one at `end`; whether there was anything.

    The plan's last row is the request's.
    """
    first, end = request.num_scored_tokens, min(end, request.num_prompt_tokens - 1)
    if not num_unscored_tokens(request) or end <= first:
        return False
    plan.prompt_logprobs.append((len(plan.rows) - 1, first, end - first))
    request.num_scored_tokens = end
    return True


def take_scores(scored: list[Request], output: ModelRunnerOutput) -> None:
    for request, entries in zip(scored, output.prompt_logprobs, strict=True):
        request.prompt_logprobs.extend(entries)
