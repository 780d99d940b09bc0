"""What a caller gets back: RequestOutput with one CompletionOutput per generated sequence (vLLM's names).

Plain data without torch. Invariant: `finish_reason` is None exactly while the sequence is still running.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanovllm.errors import RequestError


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token as the model saw it, before temperature, penalties and filters.

    logprob: natural log of its probability over the whole vocabulary. rank: 1 for the most likely token; tokens that
    tie share the better rank. decoded_token: what it adds to the text of the tokens before it; None without a tokenizer
    or with detokenize=False.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(kw_only=True)
class CompletionOutput:
    """One generated sequence.

    text: decoded output, without special tokens by default; empty when detokenize=False.
    finish_reason: "stop" (EOS, stop token or stop string), "length" (max_tokens or model length), "abort", "error", or
        None.
    stop_reason: the stop string or stop token id that ended it; None for EOS and for every other reason.
    error: why the sequence could not go on, where finish_reason is "error"; what it had until then is here.
    cumulative_logprob: sum of the log-probabilities of token_ids; logprobs: for each of token_ids, token id to Logprob
        of that token and of the most likely ones. Both are None unless SamplingParams.logprobs asks for them.
    weights_changes: (index into token_ids, version) where weights of another version than 0 begin; see
        `weights_versions`.
    hidden_states: for each layer that SamplingParams.capture names, a float32 tensor [tokens of prompt and output but
        the last, hidden_size] on the CPU, once the request has ended; else None.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: Sequence[Mapping[int, Logprob]] | None = None
    hidden_states: dict[int | str, Any] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    weights_changes: list[tuple[int, int]] = field(default_factory=list)

    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def weights_versions(self) -> list[int]:
        """With which version of the weights each of token_ids was computed; 0 are those that the engine began with."""
        changes = [(0, 0), *self.weights_changes]
        ends = [index for index, _ in self.weights_changes] + [len(self.token_ids)]
        return [version for (start, version), end in zip(changes, ends, strict=True) for _ in range(start, end)]


@dataclass(kw_only=True)
class RequestOutput:
    """One request: its prompt and what has been generated so far (cumulative).

    prompt: the text that was given; None when the prompt was token ids.
    num_cached_tokens: prompt tokens that came from the prefix cache instead of being computed.
    prompt_logprobs: for each prompt token, token id to Logprob of that token and of the most likely ones, given the
        tokens before it; the first entry is None. None unless SamplingParams.prompt_logprobs asks for them.
    deterministic: whether the engine's option of that name was on. If not, the last bits of log-probabilities, and
        where two tokens nearly tie the tokens too, may depend on what else was running.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    prompt_logprobs: list[Mapping[int, Logprob] | None] | None = None
    deterministic: bool = False


@dataclass(kw_only=True)
class BeamSearchSequence:
    """One sequence of a beam search. tokens: prompt and output; cum_logprob: of the output; text: of the output.

    finish_reason: "stop" (EOS, which is then the last of tokens) or "length" (max_tokens).
    """

    tokens: list[int]
    num_prompt_tokens: int
    cum_logprob: float = 0.0
    text: str = ""
    finish_reason: str | None = None


@dataclass(kw_only=True)
class BeamSearchOutput:
    """sequences: the best ones of a prompt, best first."""

    sequences: list[BeamSearchSequence]


def raise_error_of(outputs: Iterable[RequestOutput]) -> None:
    """Raise RequestError if a sequence among them could not go on."""
    for completion in (completion for output in outputs for completion in output.outputs):
        if completion.error is not None:
            raise RequestError(completion.error)
