"""What a step brings beside tokens: log-probabilities, hidden states, and why some rows have no token.

Owns their way to the host, and the steps that need hidden states for it. Invariant: all is queued before the tokens are
read back, so that whoever waits for those has it.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from nanovllm.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput, TokenLogprobs
from nanovllm.runner.hidden_states import captured_layers
from nanovllm.runner.prompt_logprobs import score_prompts
from nanovllm.sampling.rows import SampledRows

if TYPE_CHECKING:
    from nanovllm.runner.model_runner import ModelRunner, PendingTokens


@dataclass(frozen=True)
class PendingExtras:
    """logprobs: (which of the tokens, theirs), packed as all that follow. prompt_logprobs: per item of the plan's, in
    parts. hidden_states: as in `hidden_states.py`. failures: as in ModelRunnerOutput.
    """

    logprobs: Sequence[tuple[np.ndarray, Tensor]] = ()
    prompt_logprobs: Sequence[Sequence[Tensor]] = ()
    hidden_states: Sequence[dict[int | str, Tensor]] = ()
    failures: dict[int, str] = field(default_factory=dict)

    def of_sampled(self, runner: "ModelRunner", logits: Tensor, tokens: Tensor, rows: SampledRows) -> "PendingExtras":
        """These, with what the rows [n] asked of what was just drawn."""
        pipeline = runner.sampler.pipeline
        if pipeline is None:
            return self
        logprobs = [(members, runner.to_host(top)) for members, top in pipeline.logprobs(logits, tokens, rows)]
        return replace(self, logprobs=logprobs, failures=pipeline.take_failures(rows.rows_host))

    def add_to(self, output: ModelRunnerOutput) -> None:
        """Once the device has come so far."""
        output.hidden_states, output.failures = list(self.hidden_states), self.failures
        if self.logprobs:
            output.logprobs = [None] * sum(map(len, output.token_ids))
        for members, top in self.logprobs:
            for member, entry in zip(members.tolist(), _entries(top), strict=True):
                output.logprobs[member] = entry
        last = -1
        for index, token_ids in enumerate(output.token_ids if self.failures and self.logprobs else ()):
            last += len(token_ids)
            if index in self.failures:  # the last of its tokens means nothing
                output.logprobs[last] = None
        for parts in self.prompt_logprobs:
            output.prompt_logprobs.append([entry for top in parts for entry in _entries(top)])


NO_EXTRAS = PendingExtras()


def _entries(top: Tensor) -> list[TokenLogprobs]:
    data, size = top.numpy().tobytes(), top[0].numel() * top.element_size()
    return [data[start : start + size] for start in range(0, len(data), size)]


def run_with_hidden_states(runner: "ModelRunner", plan: SchedulerOutput) -> "PendingTokens":
    """As `ModelRunner.run`, for a plan that scores prompts, captures layers or verifies drafts."""
    batch = runner.stage(plan)
    captures = nullcontext[Sequence[dict[int | str, Tensor]]](())
    if plan.capture_layers:
        captures = captured_layers(  # type: ignore[assignment]
            runner.model, plan.rows, plan.num_scheduled_tokens, plan.capture_layers, runner.to_host
        )
    with captures as captured:
        if plan.num_draft_tokens:
            from nanovllm.runner.verify import begin_verifying, verify  # a room: most engines never have drafts

            begin_verifying(runner, plan)
        hidden, seq_lens = runner.forward(plan, batch)
    scores = score_prompts(plan, batch.rows, hidden, runner)
    extras = PendingExtras(prompt_logprobs=scores, hidden_states=captured)
    if plan.num_draft_tokens:
        return verify(runner, plan, hidden, extras)
    return runner.sample(plan, batch, hidden, seq_lens, extras)
