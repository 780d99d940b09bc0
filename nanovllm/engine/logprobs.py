"""Log-probabilities as a caller sees them: maps from token id to `Logprob`, whose entries are made when they are read.

Owns the maps, the text of single tokens, and what was made of requests that are still growing. Invariant: a map takes
no more memory than the worker's numbers, of which it may have one for each token of the vocabulary.
"""

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from nanovllm.detokenizer import DetokenizerStream
from nanovllm.engine.request import Request
from nanovllm.engine.scheduler_output import TOKEN_LOGPROB, TokenLogprobs
from nanovllm.outputs import Logprob
from nanovllm.tokenizer import Tokenizer

_OWN = struct.Struct("=if")  # how a TOKEN_LOGPROB begins


class LogprobsMap(Mapping[int, Logprob]):
    """The token itself, then the most likely ones in falling order. Pickled or copied, it becomes a dict."""

    def __init__(self, entries: TokenLogprobs, text: Callable[[int], str | None]) -> None:
        """text: of a token id; asked when a `Logprob` is read."""
        self._entries = entries
        self._text = text
        self._next = 0  # the entry behind the last one that was read: most readers go from one to the next

    @cached_property
    def entries(self) -> np.ndarray:
        """The numbers as TOKEN_LOGPROB, each token once: one of the most likely may be the token itself."""
        entries = np.frombuffer(self._entries, TOKEN_LOGPROB)
        ids = entries["token_id"]
        again = np.flatnonzero(ids[1:] == ids[0])
        return np.delete(entries, again + 1) if len(again) else entries

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[int]:
        return iter(self.entries["token_id"].tolist())

    def __getitem__(self, token_id: int) -> Logprob:
        ids = self.entries["token_id"]
        index = self._next
        if index >= len(ids) or ids[index] != token_id:
            found = np.flatnonzero(ids == token_id)
            if not len(found):
                raise KeyError(token_id)
            index = int(found[0])
        self._next = index + 1
        token_id, logprob, rank = self.entries[index].item()
        return Logprob(logprob, rank, self._text(token_id))

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class LogprobsDecoder:
    """Maps of one sequence of tokens. A token's text is what it adds to the text of those before, so texts of the drawn
    tokens join to the text; a special token has its own. tokenizer=None leaves `decoded_token` None.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._stream = None if tokenizer is None else DetokenizerStream(tokenizer, False, follows_text=True)
        self.maps: list[LogprobsMap] = []

    def extend(self, entries: Sequence[TokenLogprobs]) -> list[LogprobsMap]:
        """The maps of these; those of its first ones are there already."""
        for entry in entries[len(self.maps) :]:
            self.maps.append(LogprobsMap(entry, _no_text if self._stream is None else self._stream.texts_here()))
            token_id, _ = _OWN.unpack_from(entry)
            self._text(token_id)
        return self.maps

    def start_after(self, token_id: int) -> None:
        """The sequence goes on after this token, which has no map."""
        self._text(token_id)

    def _text(self, token_id: int) -> str | None:
        return None if self._stream is None else self._stream.step(token_id)


class LogprobsOfRequests:
    """The maps of requests that are still growing."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._outputs: dict[Request, LogprobsDecoder] = {}
        self._prompts: dict[Request, LogprobsDecoder] = {}

    def of_output(self, request: Request) -> list[Mapping[int, Logprob]] | None:
        """One map for each output token; None if the request did not ask."""
        if request.params.logprobs is None:
            return None
        if request not in self._outputs:
            self._outputs[request] = self._new_decoder(request)
        return list(self._outputs[request].extend(request.logprobs))

    def of_prompt(self, request: Request) -> list[Mapping[int, Logprob] | None] | None:
        """One map for each prompt token, None for the first; None until the whole prompt is computed."""
        if request.params.prompt_logprobs is None or len(request.prompt_logprobs) < request.num_prompt_tokens - 1:
            return None
        if request not in self._prompts:
            self._prompts[request] = self._new_decoder(request)
            self._prompts[request].start_after(request.token_ids[0])
        return [None, *self._prompts[request].extend(request.prompt_logprobs)]

    def cumulative(self, request: Request) -> float | None:
        """Sum over the output tokens; None if the request did not ask for their log-probabilities."""
        return None if request.params.logprobs is None else sum(map(own_logprob, request.logprobs))

    def forget(self, request: Request) -> None:
        self._outputs.pop(request, None)
        self._prompts.pop(request, None)

    def _new_decoder(self, request: Request) -> LogprobsDecoder:
        return LogprobsDecoder(self._tokenizer if request.params.detokenize else None)


def _no_text(token_id: int) -> None:
    return None


def own_logprob(entry: TokenLogprobs) -> float:
    """Of the token itself."""
    _, logprob = _OWN.unpack_from(entry)
    return float(logprob)
