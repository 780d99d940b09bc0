"""Request: the host's record of one generated sequence, and its two counters.

Owns nothing but its fields; `scheduler.py` moves the counters and `output_processor.py` reads them. Invariant: of the
request's `num_tokens`, the first `num_computed_tokens` have their KV written or in flight.

        token_ids (known to the host)          pending (sampled, only on the device so far)
        |------------------------------------|--|
        |-- num_computed_tokens --|-- left to compute --|
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from nanovllm.engine.interfaces import TokenConstraint
from nanovllm.engine.scheduler_output import TokenLogprobs
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.features.adapters import AdapterUse
    from nanovllm.engine.features.capture import Capture
    from nanovllm.engine.features.context_length import Context
    from nanovllm.engine.features.scoring import Scoring


class End(NamedTuple):
    """What a request that has ended says of it; error: why, where finish_reason is "error"."""

    finish_reason: str
    stop_reason: int | str | None = None
    error: str | None = None


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One prompt and what grows from it. token_ids holds prompt and output, in one list."""

    request_id: str
    prompt: str | None
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]  # EOS (unless ignored) and the request's own
    stop_reasons: Mapping[int, str | None] = field(default_factory=dict)  # of those whose reason is not their id
    max_total_tokens: int  # prompt and output: the nearest of max_tokens, model length and cache size
    cache_salt: bytes = b""  # requests with different salts never share KV blocks
    hash_root: bytes = b""  # before the first block's hash: the weights and the salt that its KV was begun with
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that the output must not hold
    needs_history: bool = False  # the worker must know all tokens that the host knows when the request enters a row
    needs_host_tokens: bool = False  # the host must have read every token before the next one can be planned
    index: int = 0  # among the sequences of its prompt

    # What few requests have, each in a file of `features/`.
    siblings: list["Request"] = field(default_factory=list)  # these sequences, itself included; empty if it is alone
    constraint: TokenConstraint | None = None
    context: "Context | None" = None
    scoring: "Scoring | None" = None
    capture: "Capture | None" = None
    adapter: "AdapterUse | None" = None

    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    num_cached_tokens: int | None = None  # set once, when the request is first admitted
    begun_at: float | None = None  # by `time.monotonic`, when that was
    row: int = -1  # its place in the device state while it runs; else it waits, or has ended
    block_ids: list[list[int]] = field(default_factory=list)  # a table for each group of layers; empty while it waits
    block_hashes: list[bytes] = field(default_factory=list)  # of its full blocks, computed once
    num_published_blocks: int = 0  # of each table, how many are full, computed or in flight, and so fit to be shared
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the output tokens
    weights_versions: list[tuple[int, int]] = field(default_factory=list)  # see `features/weights_version.py`
    end: End | None = None
    prompt_token_ids: list[int] | None = None  # one list for all outputs, made with the first

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens a next step may compute; 0 once the last token that the request may have is sampled or in flight.

        Also 0 while a token that the host has to see first is on its way: such a request skips a step for each step
        that is in flight, and everyone else goes on. And 0 from the token on with which all are computed anew.
        """
        num_tokens = len(self.token_ids) + self.num_pending_tokens
        if num_tokens >= self.max_total_tokens or (self.needs_host_tokens and self.num_pending_tokens):
            return 0
        if self.context is not None and self.context.is_outgrown_by(num_tokens):
            return 0
        return num_tokens - self.num_computed_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        return self.end is not None

    @property
    def is_running(self) -> bool:
        """Does it hold a row and blocks?"""
        return self.row >= 0
