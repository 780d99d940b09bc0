"""Log-probabilities as a caller sees them: maps from token id to `Logprob`, whose entries are made when they are read.

Owns the maps, the text of single tokens, and what was made of a request that is still growing. Invariant: a map takes
no more memory than the worker's numbers, of which it may have one for each token of the vocabulary.
"""

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, overload

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


class LogprobsList(Sequence[LogprobsMap]):
    """The maps of some tokens without their texts, each made when it is read: thousands at once would keep the garbage
    collector at work. Pickled or copied, it becomes a list."""

    def __init__(self, entries: Sequence[TokenLogprobs]) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> LogprobsMap: ...
    @overload
    def __getitem__(self, index: slice) -> "LogprobsList": ...
    def __getitem__(self, index: int | slice) -> "LogprobsMap | LogprobsList":
        if isinstance(index, slice):
            return LogprobsList(self._entries[index])
        return LogprobsMap(self._entries[index], _no_text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


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


class LogprobsOfRequest:
    """The maps of a request that is still growing. They are only ever added to: while one thread takes what is new,
    another may read what was there before.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self._request = request
        self._tokenizer = tokenizer if request.params.detokenize else None
        self._with_texts = None if self._tokenizer is None else LogprobsDecoder(self._tokenizer)
        self._summed = 0, 0.0  # how many tokens, and the sum of their log-probabilities
        self.prompt: list[Mapping[int, Logprob] | None] | None = None

    def take(self) -> None:
        """Take what has come since the last call."""
        request = self._request
        if request.params.logprobs is not None and self._with_texts is not None:
            self._with_texts.extend(request.logprobs)
        if request.params.prompt_logprobs is not None and self.prompt is None:
            self.prompt = self._of_prompt()

    def between(self, start: int, end: int) -> Sequence[Mapping[int, Logprob]] | None:
        """One map for each of these output tokens; None if the request did not ask."""
        if self._request.params.logprobs is None:
            return None
        if self._with_texts is None:
            return LogprobsList(self._request.logprobs[start:end])
        return [*self._with_texts.maps[start:end]]

    def cumulative(self, end: int) -> float | None:
        """Sum over the output tokens up to there; None if the request did not ask for their log-probabilities."""
        if self._request.params.logprobs is None:
            return None
        start, total = self._summed if self._summed[0] <= end else (0, 0.0)
        if entries := self._request.logprobs[start:end]:
            own = np.frombuffer(b"".join(entries), TOKEN_LOGPROB).reshape(len(entries), -1)["logprob"][:, 0]
            total = float(np.cumsum([total, *own.tolist()])[-1])  # one after the other, wherever a stream was cut
        self._summed = end, total
        return total

    def _of_prompt(self) -> list[Mapping[int, Logprob] | None] | None:
        """One map for each prompt token, None for the first; None until the whole prompt is computed."""
        request, scoring = self._request, self._request.scoring
        if scoring is None or len(scoring.logprobs) < request.num_prompt_tokens - 1:
            return None
        decoder = LogprobsDecoder(self._tokenizer)
        decoder.start_after(request.token_ids[0])
        return [None, *decoder.extend(scoring.logprobs)]


def _no_text(token_id: int) -> None:
    return None


def own_logprob(entry: TokenLogprobs) -> float:
    """Of the token itself."""
    _, logprob = _OWN.unpack_from(entry)
    return float(logprob)
