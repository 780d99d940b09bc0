"""LogprobsDecoder: the workers' numbers become the `Logprob` objects that a caller sees.

Owns the text of single tokens, and what it has converted of requests that are still growing. Invariant: an entry is
converted once, however often a request's output is looked at.
"""

from nanovllm.engine.request import Request
from nanovllm.engine.scheduler_output import TokenLogprobs
from nanovllm.outputs import Logprob
from nanovllm.tokenizer import Tokenizer


class LogprobsDecoder:
    """tokenizer=None leaves `decoded_token` None."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._outputs: dict[Request, list[dict[int, Logprob]]] = {}
        self._prompts: dict[Request, list[dict[int, Logprob]]] = {}

    def of_output(self, request: Request) -> list[dict[int, Logprob]] | None:
        """One entry for each output token; None if the request did not ask."""
        if request.params.logprobs is None:
            return None
        return self._convert(request, request.logprobs, self._outputs)

    def of_prompt(self, request: Request) -> list[dict[int, Logprob] | None] | None:
        """One entry for each prompt token, None for the first; None until the whole prompt is computed."""
        if request.params.prompt_logprobs is None or len(request.prompt_logprobs) < request.num_prompt_tokens - 1:
            return None
        return [None, *self._convert(request, request.prompt_logprobs, self._prompts)]

    def forget(self, request: Request) -> None:
        self._outputs.pop(request, None)
        self._prompts.pop(request, None)

    def _convert(
        self, request: Request, entries: list[TokenLogprobs], converted: dict[Request, list[dict[int, Logprob]]]
    ) -> list[dict[int, Logprob]]:
        done = converted.setdefault(request, [])
        has_text = request.params.detokenize
        done += [
            {
                token_id: Logprob(logprob, rank, self._text(token_id) if has_text else None)
                for token_id, logprob, rank in entry
            }
            for entry in entries[len(done) :]
        ]
        return list(done)

    def _text(self, token_id: int) -> str | None:
        if self._tokenizer is None:
            return None
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text


def cumulative_logprob(request: Request) -> float | None:
    """Sum over the output tokens; None if the request did not ask for log-probabilities."""
    if request.params.logprobs is None:
        return None
    return sum(entry[0][1] for entry in request.logprobs)
