"""Log-probabilities that requests ask for: which tokens of a prompt a step scores, and what it brings.

Owns the count of what is scored; the numbers are the runner's. Invariant: each token of a prompt but the first is asked
for once, preempted or not; of the n sequences of a prompt the first one asks.
"""

from dataclasses import dataclass, field

from nanovllm.engine.request import Request
from nanovllm.engine.scheduler_output import SchedulerOutput, TokenLogprobs
from nanovllm.sampling_params import SamplingParams


@dataclass(slots=True)
class Scoring:
    """Of a request that asks for its prompt's log-probabilities.

    num_skipped_tokens: leading tokens whose successor's nobody wants. num_scored_tokens: leading tokens whose
    successor's is known or in flight. logprobs: what is known.
    """

    num_skipped_tokens: int = 0
    num_scored_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def skip(self, num_tokens: int) -> None:
        """Score nothing before the token behind these. For a request that is not queued yet."""
        self.num_skipped_tokens = self.num_scored_tokens = num_tokens

    def begin_anew(self) -> None:
        self.num_scored_tokens = self.num_skipped_tokens + len(self.logprobs)

    def limit_prefix(self, request: Request, num_tokens: int) -> int:
        """How much of a prefix can be taken: a token whose successor is to be scored is computed."""
        is_scored = self.num_scored_tokens >= request.num_prompt_tokens - 1
        return num_tokens if is_scored else self.num_scored_tokens

    def plan(self, plan: SchedulerOutput, request: Request, end: int) -> bool:
        """Ask for what is not known of the prompt tokens up to the one at `end`; whether there was anything.

        The plan's last row is the request's.
        """
        first, end = self.num_scored_tokens, min(end, request.num_prompt_tokens - 1)
        if end <= first:
            return False
        plan.prompt_logprobs.append((len(plan.rows) - 1, first, end - first))
        self.num_scored_tokens = end
        return True


def check_num_logprobs(params: SamplingParams, max_logprobs: int, name: str) -> None:
    """Raise ValueError for `name` if it asks for more than max_logprobs, at least 0."""
    for field_name in ("logprobs", "prompt_logprobs"):
        asked = getattr(params, field_name)
        if asked is not None and not 0 <= asked <= max_logprobs:
            raise ValueError(
                f"{name}: {field_name}={asked} asks for more than max_logprobs={max_logprobs}; raise that, or ask for "
                "fewer"
            )
