"""OutputProcessor: token ids to text, stop strings, and the RequestOutput a caller sees.

Owns the decoding state of each request that needs text before it ends; counters and queues belong to the scheduler.
Whoever steps the engine marks how far a request may be read; whoever reads remembers the mark, and makes an output of
what lies between two of them, in any thread. Invariant: what lies before a mark never changes. Text only ever grows,
and is cut at a stop string before anyone sees it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from nanovllm.detokenizer import DetokenizerStream
from nanovllm.engine.features.weights_version import changes_between
from nanovllm.engine.logprobs import LogprobsOfRequest
from nanovllm.engine.output_text import OutputText
from nanovllm.engine.request import Request
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.tokenizer import Tokenizer


class Mark(NamedTuple):
    """How far a sequence may be read."""

    num_tokens: int  # of its output
    num_characters: int
    is_ended: bool
    text: OutputText | None
    logprobs: LogprobsOfRequest | None


Marks = Sequence[Mark]  # of the sequences of one prompt
_START = Mark(0, 0, False, None, None)


class OutputProcessor:
    """tokenizer=None leaves every text empty."""

    def __init__(self, tokenizer: Tokenizer | None, is_deterministic: bool = False) -> None:
        self._tokenizer = tokenizer
        self._is_deterministic = is_deterministic
        self._texts: dict[Request, OutputText] = {}
        self._logprobs: dict[Request, LogprobsOfRequest] = {}

    def find_stop_string(self, request: Request) -> str | None:
        """The stop string that the request's newest token completed, if any; not before min_tokens. See `ends.py`."""
        text = self._text_of(request)
        if text is None:
            return None
        found = text.find_stop_string()
        return found if len(request.token_ids) - request.num_prompt_tokens > request.params.min_tokens else None

    def mark(self, group: Sequence[Request]) -> Marks:
        """How far the sequences of one prompt may be read now, between two steps."""
        return [self._mark(request) for request in group]

    def make_output(
        self, group: Sequence[Request], marks: Marks | None = None, since: Marks | None = None
    ) -> RequestOutput:
        """What the sequences of one prompt have produced up to these marks; None: up to now, between two steps.

        since: marks of an earlier output, () if there is none. Then only what is new, of the sequences that have
        anything new; the prompt's log-probabilities come with its first token.
        """
        first = group[0]
        if first.prompt_token_ids is None:
            first.prompt_token_ids = first.token_ids[: first.num_prompt_tokens]
        if marks is None:
            marks = self.mark(group)
        outputs = []
        is_finished = True
        for request, start, mark in zip(group, since or [_START] * len(group), marks, strict=True):
            is_finished &= mark.is_ended
            if since is None or mark.num_tokens > start.num_tokens or mark.is_ended > start.is_ended:
                outputs.append(_completion(request, start, mark))
        logprobs = marks[0].logprobs
        return RequestOutput(
            request_id=first.request_id,
            prompt=first.prompt,
            prompt_token_ids=first.prompt_token_ids,
            outputs=outputs,
            finished=is_finished,
            num_cached_tokens=first.num_cached_tokens or 0,
            prompt_logprobs=None if logprobs is None or (since and since[0].num_tokens) else logprobs.prompt,
            deterministic=self._is_deterministic,
        )

    def forget(self, request: Request) -> None:
        """Drop the decoding state. If the request is asked for again, its tokens are decoded anew."""
        self._texts.pop(request, None)
        self._logprobs.pop(request, None)

    def _mark(self, request: Request) -> Mark:
        text, logprobs = self._text_of(request), self._logprobs_of(request)
        if logprobs is not None:
            logprobs.take()
        num_tokens = len(request.token_ids) - request.num_prompt_tokens
        return Mark(num_tokens, 0 if text is None else text.num_characters(), request.is_finished, text, logprobs)

    def _logprobs_of(self, request: Request) -> LogprobsOfRequest | None:
        if request.params.logprobs is None and request.params.prompt_logprobs is None:
            return None
        if request not in self._logprobs:
            self._logprobs[request] = LogprobsOfRequest(request, self._tokenizer)
        return self._logprobs[request]

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


def _completion(request: Request, start: Mark, end: Mark) -> CompletionOutput:
    """What lies between two marks of a sequence. Of the request it reads what does not change any more."""
    text, logprobs, num_before = end.text, end.logprobs, request.num_prompt_tokens
    output = CompletionOutput(
        index=request.index,
        text="" if text is None else text.between(start.num_characters, end.num_characters),
        token_ids=request.token_ids[num_before + start.num_tokens : num_before + end.num_tokens],
    )
    if request.weights_versions:
        output.weights_changes = changes_between(request.weights_versions, start.num_tokens, end.num_tokens)
    if logprobs is not None:
        output.logprobs = logprobs.between(start.num_tokens, end.num_tokens)
        output.cumulative_logprob = logprobs.cumulative(end.num_tokens)
    if end.is_ended and request.end is not None:
        output.finish_reason, output.stop_reason, output.error = request.end
        if request.capture is not None:
            output.hidden_states = request.capture.by_layer()
    return output
