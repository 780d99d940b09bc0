"""What a caller gets back: RequestOutput with one CompletionOutput per generated sequence (vLLM's names).

Plain data without torch. Invariant: `finish_reason` is None exactly while the sequence is still running.
"""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class CompletionOutput:
    """One generated sequence.

    text: decoded output, without special tokens by default; empty when detokenize=False.
    finish_reason: "stop" (EOS, stop token or stop string), "length" (max_tokens or model length), "abort", or None.
    stop_reason: the stop string or stop token id that ended it; None for EOS and for every other reason.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(kw_only=True)
class RequestOutput:
    """One request: its prompt and what has been generated so far (cumulative).

    prompt: the text that was given; None when the prompt was token ids.
    num_cached_tokens: prompt tokens that came from the prefix cache instead of being computed.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
