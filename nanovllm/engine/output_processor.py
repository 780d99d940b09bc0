"""OutputProcessor: token ids to text, stop strings, and the RequestOutput a caller sees.

Owns the decoding state of each request that needs text before it ends; counters and queues belong to the scheduler.
Invariant: text only ever grows, and is cut at a stop string before anyone sees it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nanovllm.detokenizer import DetokenizerStream
from nanovllm.engine.output_text import OutputText
from nanovllm.engine.request import Request
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanovllm.engine.logprobs import LogprobsOfRequests


class OutputProcessor:
    """tokenizer=None leaves every text empty."""

    def __init__(self, tokenizer: Tokenizer | None, is_deterministic: bool = False) -> None:
        self._tokenizer = tokenizer
        self._is_deterministic = is_deterministic
        self._logprobs: LogprobsOfRequests | None = None  # a leaf, for requests that ask
        self._texts: dict[Request, OutputText] = {}
        self._prompts: dict[Request, list[int]] = {}  # one list for all outputs of a request

    def find_stop_string(self, request: Request) -> str | None:
        """The stop string that the request's newest token completed, if any; not before min_tokens. See `ends.py`."""
        text = self._text_of(request)
        if text is None:
            return None
        found = text.find_stop_string()
        return found if len(request.token_ids) - request.num_prompt_tokens > request.params.min_tokens else None

    def make_output(self, group: Sequence[Request]) -> RequestOutput:
        """What the sequences of one prompt have produced so far."""
        first = group[0]
        logprobs = self._logprobs_of(first)
        return RequestOutput(
            request_id=first.request_id,
            prompt=first.prompt,
            prompt_token_ids=self._prompt_of(first),
            outputs=[self._completion(request) for request in group],
            finished=all(request.is_finished for request in group),
            num_cached_tokens=first.num_cached_tokens or 0,
            prompt_logprobs=None if logprobs is None else logprobs.of_prompt(first),
            deterministic=self._is_deterministic,
        )

    def forget(self, request: Request) -> None:
        """Drop the decoding state. If the request is asked for again, its tokens are decoded anew."""
        self._texts.pop(request, None)
        self._prompts.pop(request, None)
        if self._logprobs is not None:
            self._logprobs.forget(request)

    def _completion(self, request: Request) -> CompletionOutput:
        text, logprobs = self._text_of(request), self._logprobs_of(request)
        return CompletionOutput(
            index=request.index,
            text="" if text is None else text.whole(text.num_characters()),
            token_ids=request.output_token_ids,
            cumulative_logprob=None if logprobs is None else logprobs.cumulative(request),
            logprobs=None if logprobs is None else logprobs.of_output(request),
            hidden_states=self._hidden_states(request),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            error=request.error,
        )

    def _logprobs_of(self, request: Request) -> "LogprobsOfRequests | None":
        if request.params.logprobs is None and request.params.prompt_logprobs is None:
            return None
        if self._logprobs is None:
            from nanovllm.engine.logprobs import LogprobsOfRequests

            self._logprobs = LogprobsOfRequests(self._tokenizer)
        return self._logprobs

    def _prompt_of(self, first: Request) -> list[int]:
        if first not in self._prompts:
            self._prompts[first] = first.token_ids[: first.num_prompt_tokens]
        return self._prompts[first]

    @staticmethod
    def _hidden_states(request: Request) -> dict[int, list[Any]] | None:
        """Layer -> parts in order, to be joined by whoever may know of tensors."""
        if request.params.capture is None or not request.is_finished:
            return None
        return {layer: [part[layer] for part in request.hidden_states] for layer in request.params.capture["layers"]}

    def _text_of(self, request: Request) -> OutputText | None:
        params = request.params
        if self._tokenizer is None or not params.detokenize:
            return None
        text = self._texts.get(request)
        if text is None:
            stream = DetokenizerStream(
                self._tokenizer, params.skip_special_tokens, params.spaces_between_special_tokens, follows_text=True
            )
            text = self._texts[request] = OutputText(request, stream)
        return text
