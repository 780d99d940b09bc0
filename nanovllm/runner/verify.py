"""Verification of drafts: the tokens of a step's requests where some have a draft behind their last token.

Owns which logits belong to which token, and how far a draft is accepted: a token is drawn behind the request's last
token and behind each of its draft, by the logits, parameters and random numbers with which it would have been drawn
alone. Those before the first that differs from the draft are the request's, and that one. Invariant: what a row
remembers on the device afterwards (tokens computed, last token, counts of penalties) is what it would remember had it
decoded these tokens one by one.

    all drawn at once          where nobody edits logits: the draft changes nothing about how its followers are drawn
    one position at a time     where edits depend on the tokens before: penalties, bad words, forms, functions
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput
from nanovllm.kernels.draft_places import Places
from nanovllm.runner.extras import PendingExtras
from nanovllm.runner.model_runner import ModelRunner, PendingTokens
from nanovllm.runner.stateful_rows import Drafts, StatefulRows
from nanovllm.sampling.rows import SampledRows, upload


@dataclass(frozen=True)
class Draws:
    """Every token that a step draws, [n]; those of a request follow each other. All on the host.

    firsts, counts [num_sampled]: of each request that samples, its first draw and how many it has.
    requests [n]: index into the plan's requests. sources [n]: of the step's tokens, the one that the drawn one follows.
    drafts [n]: the token that must be drawn for the next draw to count; -1 behind the last of a request.
    """

    rows: np.ndarray
    firsts: np.ndarray
    counts: np.ndarray
    requests: np.ndarray
    sources: np.ndarray
    positions: np.ndarray
    drafts: np.ndarray


def find_draws(plan: SchedulerOutput) -> Draws:
    sampled = np.flatnonzero(plan.num_samples)
    counts = np.array(plan.num_samples)[sampled]
    firsts = np.cumsum(counts) - counts
    requests = sampled.repeat(counts)
    ends = np.cumsum(plan.num_scheduled_tokens)[requests]
    left = (firsts + counts).repeat(counts) - np.arange(len(requests)) - 1  # draws of the same request behind this one
    sources = ends - 1 - left
    token_ids = np.array(plan.token_ids + [-1])
    lens = (np.array(plan.num_computed_tokens) + np.array(plan.num_scheduled_tokens))[requests]
    return Draws(
        rows=np.array(plan.rows)[requests],
        firsts=firsts,
        counts=counts,
        requests=requests,
        sources=sources,
        positions=lens - left,
        drafts=np.where(left > 0, token_ids[sources + 1], -1),
    )


@dataclass(frozen=True)
class PendingDraws(PendingTokens):
    """tokens [n + num_sampled]: those drawn, then how many drafts each request accepted. extras: of what is accepted,
    and of the tokens behind."""

    draws: Draws

    def result(self) -> ModelRunnerOutput:
        if self.event is not None:
            self.event.synchronize()
        words, n = self.tokens.tolist(), len(self.draws.rows)
        firsts = self.draws.firsts.tolist()
        token_ids = [words[first : first + accepted + 1] for first, accepted in zip(firsts, words[n:], strict=True)]
        output = ModelRunnerOutput(token_ids=token_ids)
        self.extras.add_to(output)
        return output


def verify(runner: ModelRunner, plan: SchedulerOutput, hidden: Tensor, extras: PendingExtras) -> PendingDraws:
    """As `ModelRunner.sample`, for a plan with drafts."""
    draws = find_draws(plan)
    sources, rows = upload(np.stack((draws.sources, draws.rows)), hidden.device)
    logits = runner.compute_logits(hidden[sources], rows)
    return draw(runner, plan, draws, logits, extras)


def draw(
    runner: ModelRunner, plan: SchedulerOutput, draws: Draws, logits: Tensor, extras: PendingExtras
) -> PendingDraws:
    """logits [n, V], behind each draw's source. The step has counted all its tokens as computed."""
    device = logits.device
    on_device = upload(np.stack((draws.rows, draws.positions, draws.drafts)).astype(np.int32), device)
    rows = SampledRows(draws.rows, on_device[0], draws.positions, on_device[1])
    if asks_nothing(runner, draws.rows[draws.firsts].tolist()):
        tokens = runner.sampler.draw(logits, rows)
        accepted = _num_accepted(draws, tokens, on_device[2])
    else:
        tokens, accepted, extras = _draw_in_turn(runner, draws, logits, rows, extras)
    firsts, counts = upload(np.stack((draws.firsts, draws.counts)), device)
    rows_of_requests = on_device[0][firsts].long()
    runner.sampler.columns.last_token[rows_of_requests] = tokens[firsts + accepted]
    runner.state.num_computed[rows_of_requests] -= (counts - 1 - accepted).int()
    if isinstance(runner.layer_groups, StatefulRows):
        drafts, positions = _drafts_of(plan, device)
        is_end = torch.zeros(len(plan.token_ids), dtype=torch.int32, device=device)
        is_end[upload(draws.sources, device)[firsts + accepted]] = 1
        runner.layer_groups.end_verifying(drafts, positions, is_end)
    words = torch.cat((tokens, accepted.int()))
    pending = runner.read_back(words)
    return PendingDraws(pending.tokens, pending.event, extras, draws)


def begin_verifying(runner: ModelRunner, plan: SchedulerOutput) -> None:
    """Before the model runs, kernel by kernel, on a plan with drafts."""
    if isinstance(runner.layer_groups, StatefulRows):
        runner.layer_groups.begin_verifying(_drafts_of(plan, runner.device)[0])


def _drafts_of(plan: SchedulerOutput, device: torch.device) -> tuple[Drafts, Tensor]:
    """Every token of the step as a place, and the tokens' positions."""
    counts = np.array(plan.num_scheduled_tokens)
    starts = (np.cumsum(counts) - counts).repeat(counts)
    offsets = np.arange(len(plan.token_ids)) - starts
    has_draft = (np.array(plan.num_samples) > 1).repeat(counts)
    is_last = offsets == counts.repeat(counts) - 1
    following = np.where(has_draft & ~is_last, np.roll(plan.token_ids, -1), -1)
    positions = np.array(plan.num_computed_tokens).repeat(counts) + offsets
    rows = np.array(plan.rows).repeat(counts)
    words = np.stack((rows, offsets, plan.token_ids, following, positions, has_draft)).astype(np.int32)
    *places, uploaded, is_of_draft = upload(words, device).unbind(0)
    return Drafts(Places(*places), is_of_draft > 0), uploaded


def asks_nothing(runner: ModelRunner, rows: Sequence[int]) -> bool:
    """Are these rows drawn from their logits as they are, with nobody who has to see the tokens one by one?"""
    pipeline = runner.sampler.pipeline
    return pipeline is None or (pipeline.is_plain(rows) and not any(map(pipeline.histories.of, rows)))


def _num_accepted(draws: Draws, tokens: Tensor, drafts: Tensor) -> Tensor:
    """How many of each request's draws are its draft's tokens, from the first on; int64 [num_sampled]."""
    places = draws.firsts[:, None] + np.arange(draws.counts.max())
    places = np.minimum(places, (draws.firsts + draws.counts - 1)[:, None])  # the last one of each never agrees
    agrees = (tokens == drafts)[upload(places, tokens.device)]
    return agrees.long().cumprod(1).sum(1)


def _draw_in_turn(
    runner: ModelRunner, draws: Draws, logits: Tensor, rows: SampledRows, extras: PendingExtras
) -> tuple[Tensor, Tensor, PendingExtras]:
    """Tokens [n] (0 where none was drawn), how many drafts each request accepted, and what they asked for beside."""
    pipeline = runner.sampler.pipeline
    assert pipeline is not None
    drawn = np.zeros(len(rows), dtype=np.int32)
    accepted = np.zeros(len(draws.firsts), dtype=np.int64)
    failures: dict[int, str] = {}
    going_on = np.arange(len(draws.firsts))  # requests whose drafts have been right so far
    for turn in range(int(draws.counts.max())):
        members = (draws.firsts + turn)[going_on]
        pipeline.at_draft(turn)
        chosen = rows.select(members)
        tokens = runner.sampler.sample(logits[upload(members, logits.device)], chosen)
        drawn[members] = tokens.cpu().numpy()
        failed = pipeline.take_failures(chosen.rows_host)
        failures.update((int(going_on[i]), reason) for i, reason in failed.items())
        is_right = drawn[members] == draws.drafts[members]
        is_right[list(failed)] = False
        for row, token in zip(draws.rows[members].tolist(), drawn[members].tolist(), strict=True):
            pipeline.histories.add(row, token)
        going_on = going_on[is_right]
        accepted[going_on] += 1
        if not len(going_on):
            break
    tokens = upload(drawn, logits.device)
    logprobs: list[tuple[np.ndarray, Tensor]] = []
    if (pipeline.num_logprobs[draws.rows] >= 0).any():
        kept = np.concatenate([np.arange(f, f + a + 1) for f, a in zip(draws.firsts, accepted, strict=True)])
        index = upload(kept, logits.device)
        for members, top in pipeline.logprobs(logits[index], tokens[index], rows.select(kept)):
            logprobs.append((members, runner.to_host(top)))
    extras = replace(extras, logprobs=logprobs, failures=failures)
    return tokens, upload(accepted, logits.device), extras
