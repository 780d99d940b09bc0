"""OutputProcessor: token ids to text, stop strings, and the RequestOutput a caller sees.

Owns the decoding state of each request that needs text before it ends; counters and queues belong to the scheduler.
Invariant: text only ever grows, and is cut at a stop string before anyone sees it.
"""

from collections.abc import Sequence
from typing import Any

from nanovllm.detokenizer import DetokenizerStream
from nanovllm.engine.logprobs import LogprobsDecoder, cumulative_logprob
from nanovllm.engine.request import Request
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.tokenizer import Tokenizer


class _PartialText:
    """Text of a request that is still growing, or was seen while it grew. stream is None where there is no text."""

    def __init__(self, stream: DetokenizerStream | None) -> None:
        self.stream = stream
        self.text = ""
        self.num_decoded_tokens = 0
        self.is_final = False

    def catch_up(self, request: Request) -> int:
        """Decode the tokens that arrived since the last call; returns the length of the text before them."""
        old_length = len(self.text)
        if self.stream is not None:
            for token_id in request.token_ids[request.num_prompt_tokens + self.num_decoded_tokens :]:
                self.text += self.stream.step(token_id)
                self.num_decoded_tokens += 1
        return old_length


class OutputProcessor:
    """tokenizer=None leaves every text empty."""

    def __init__(self, tokenizer: Tokenizer | None, is_deterministic: bool = False) -> None:
        self._tokenizer = tokenizer
        self._is_deterministic = is_deterministic
        self._logprobs = LogprobsDecoder(tokenizer)
        self._partial: dict[Request, _PartialText] = {}

    def find_stop_string(self, request: Request) -> str | None:
        """The stop string that the request's newest token completed, if any; its text is cut there."""
        stops = request.params.stop
        if not stops or self._tokenizer is None:
            return None
        if request.is_finished and request.finish_reason != "length":
            return None
        partial = self._partial_text(request)
        old_length = partial.catch_up(request)
        if len(request.token_ids) - request.num_prompt_tokens <= request.params.min_tokens:
            return None
        found: tuple[int, str] | None = None
        for stop in stops:
            at = partial.text.find(stop, max(0, old_length - len(stop) + 1))
            if at >= 0 and (found is None or at < found[0]):
                found = at, stop
        if found is None:
            return None
        end = found[0] + (len(found[1]) if request.params.include_stop_str_in_output else 0)
        partial.text = partial.text[:end]
        return found[1]

    def make_output(self, group: Sequence[Request]) -> RequestOutput:
        """What the sequences of one prompt have produced so far."""
        first = group[0]
        return RequestOutput(
            request_id=first.request_id,
            prompt=first.prompt,
            prompt_token_ids=first.token_ids[: first.num_prompt_tokens],
            outputs=[self._completion(request) for request in group],
            finished=all(request.is_finished for request in group),
            num_cached_tokens=first.num_cached_tokens or 0,
            prompt_logprobs=self._logprobs.of_prompt(first),
            deterministic=self._is_deterministic,
        )

    def forget(self, request: Request) -> None:
        """Drop the decoding state. A request that goes on is decoded anew; one that has ended must not be asked for."""
        self._partial.pop(request, None)
        self._logprobs.forget(request)

    def _completion(self, request: Request) -> CompletionOutput:
        token_ids = request.output_token_ids
        return CompletionOutput(
            index=request.index,
            text=self._text(request, token_ids),
            token_ids=token_ids,
            cumulative_logprob=cumulative_logprob(request),
            logprobs=self._logprobs.of_output(request),
            hidden_states=self._hidden_states(request),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            error=request.error,
        )

    @staticmethod
    def _hidden_states(request: Request) -> dict[int, list[Any]] | None:
        """Layer -> parts in order, to be joined by whoever may know of tensors."""
        if request.params.capture is None or not request.is_finished:
            return None
        return {layer: [part[layer] for part in request.hidden_states] for layer in request.params.capture["layers"]}

    def _text(self, request: Request, token_ids: list[int]) -> str:
        if self._tokenizer is None or not request.params.detokenize:
            return ""
        partial = self._partial.get(request)
        if not request.is_finished:
            partial = self._partial_text(request)
            partial.catch_up(request)
            return self._without_possible_stop(partial.text, request)
        if partial is not None and (partial.is_final or isinstance(request.stop_reason, str)):
            return partial.text
        is_ended_by_token = request.finish_reason == "stop" and token_ids[-1] in request.stop_token_ids
        if is_ended_by_token and not request.params.include_stop_str_in_output:
            token_ids = token_ids[:-1]  # the EOS or stop token itself is not part of the text
        text = self._decode(request, token_ids)
        if partial is not None:
            partial.text, partial.is_final = text, True
        return text

    def _decode(self, request: Request, token_ids: list[int]) -> str:
        assert self._tokenizer is not None
        if request.params.skip_special_tokens or request.params.spaces_between_special_tokens:
            return self._tokenizer.decode(token_ids, skip_special_tokens=request.params.skip_special_tokens)
        stream = self._new_stream(request)
        return "".join([stream.step(token_id) for token_id in token_ids]) + stream.flush()

    def _partial_text(self, request: Request) -> _PartialText:
        if request not in self._partial:
            has_text = self._tokenizer is not None and request.params.detokenize
            self._partial[request] = _PartialText(self._new_stream(request) if has_text else None)
        return self._partial[request]

    def _new_stream(self, request: Request) -> DetokenizerStream:
        assert self._tokenizer is not None
        params = request.params
        return DetokenizerStream(self._tokenizer, params.skip_special_tokens, params.spaces_between_special_tokens)

    @staticmethod
    def _without_possible_stop(text: str, request: Request) -> str:
        """Hold back an ending that may yet become a stop string, so that streamed text never has to shrink."""
        if request.params.include_stop_str_in_output:
            return text
        longest = 0
        for stop in request.params.stop or ():
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return text[: len(text) - longest]
