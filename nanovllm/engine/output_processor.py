"""OutputProcessor: token ids to text, stop strings, and the RequestOutput a caller sees.

Owns the decoding state of each request that needs text before it ends; counters and queues belong to the scheduler.
Invariant: text only ever grows, and is cut at a stop string before anyone sees it.
"""

from nanovllm.engine.request import Request
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.tokenizer import DetokenizerStream, Tokenizer


class _PartialText:
    """Text of a request that is still growing."""

    def __init__(self, stream: DetokenizerStream) -> None:
        self.stream = stream
        self.text = ""
        self.num_decoded_tokens = 0

    def catch_up(self, request: Request) -> int:
        """Decode the tokens that arrived since the last call; returns the length of the text before them."""
        old_length = len(self.text)
        for token_id in request.token_ids[request.num_prompt_tokens + self.num_decoded_tokens :]:
            self.text += self.stream.step(token_id)
            self.num_decoded_tokens += 1
        return old_length


class OutputProcessor:
    """tokenizer=None leaves every text empty."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._partial: dict[Request, _PartialText] = {}

    def find_stop_string(self, request: Request) -> str | None:
        """The stop string that the request's newest token completed, if any; its text is cut before it."""
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
        partial.text = partial.text[: found[0]]
        return found[1]

    def make_output(self, request: Request) -> RequestOutput:
        """What the request has produced so far. The decoding state of a finished request is dropped."""
        token_ids = request.output_token_ids
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.token_ids[: request.num_prompt_tokens],
            outputs=[
                CompletionOutput(
                    text=self._text(request, token_ids),
                    token_ids=token_ids,
                    finish_reason=request.finish_reason,
                    stop_reason=request.stop_reason,
                )
            ],
            finished=request.is_finished,
            num_cached_tokens=request.num_cached_tokens or 0,
        )

    def forget(self, request: Request) -> None:
        self._partial.pop(request, None)

    def _text(self, request: Request, token_ids: list[int]) -> str:
        if self._tokenizer is None or not request.params.detokenize:
            return ""
        if not request.is_finished:
            partial = self._partial_text(request)
            partial.catch_up(request)
            return self._without_possible_stop(partial.text, request)
        finished = self._partial.pop(request, None)
        if isinstance(request.stop_reason, str) and finished is not None:
            return finished.text
        if request.finish_reason == "stop":
            token_ids = token_ids[:-1]  # the EOS or stop token itself is not part of the text
        return self._tokenizer.decode(token_ids, skip_special_tokens=request.params.skip_special_tokens)

    def _partial_text(self, request: Request) -> _PartialText:
        if request not in self._partial:
            assert self._tokenizer is not None
            self._partial[request] = _PartialText(
                DetokenizerStream(self._tokenizer, request.params.skip_special_tokens)
            )
        return self._partial[request]

    @staticmethod
    def _without_possible_stop(text: str, request: Request) -> str:
        """Hold back an ending that may yet become a stop string, so that streamed text never has to shrink."""
        longest = 0
        for stop in request.params.stop or ():
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return text[: len(text) - longest]
