"""OutputText: the text of one request's output as it grows, and what of it may be shown.

Owns the pieces that tokens became, which are only ever added to: while one thread takes tokens, another may read what
was shown before. Invariant: what may be shown only ever grows, whatever is cut at the end; neither taking a token nor
showing what is new looks at more of the text than a stop string is long.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from nanovllm.detokenizer import DetokenizerStream
from nanovllm.engine.features.stop_strings import find_stop, length_of_possible_stop
from nanovllm.engine.request import End, Request


class OutputText:
    def __init__(self, request: Request, stream: DetokenizerStream) -> None:
        self._request = request
        self._stream = stream
        self._stops: Sequence[str] = request.params.stop or ()
        self._longest_stop = max(map(len, self._stops), default=0)
        self._pieces: list[str] = []
        self._ends: list[int] = []  # of each of them in the text
        self._length = 0  # of the text: of all pieces, until the request has ended and the rest is cut off
        self._whole = ""  # as it was read last
        self._num_taken = 0  # tokens
        self._before_newest = 0  # length of the text before the newest token's
        self._is_complete = False

    def find_stop_string(self) -> str | None:
        """The stop string that the newest token completed."""
        self._take_tokens(len(self._request.token_ids))
        found = find_stop(self._stops, self._longest_stop, self._join, self._before_newest, self._length)
        return None if found is None else found[1]

    def num_characters(self) -> int:
        """How much text may be shown now. While the request runs, an ending that may become a stop string may not."""
        self._catch_up()
        if not self._stops or self._request.is_finished or self._request.params.include_stop_str_in_output:
            return self._length
        return self._length - length_of_possible_stop(self._stops, self._longest_stop, self._join, self._length)

    def between(self, start: int, end: int) -> str:
        """Characters of the text that may be shown. It costs what they do, wherever they are."""
        if start:
            return self._join(start, end)
        whole = self._whole  # who reads all each time does not join small pieces each time
        self._whole = whole = (whole + self._join(len(whole), end))[:end]
        return whole

    def _join(self, start: int, end: int) -> str:
        first, last = bisect_right(self._ends, start), bisect_left(self._ends, end)
        at = self._ends[first - 1] if first else 0
        return "".join(self._pieces[first : last + 1])[start - at : end - at]

    def _catch_up(self) -> None:
        """Take what has come since the last call; at the request's end also what that leaves, and cut the text."""
        request, end = self._request, self._request.end
        if end is None:
            self._take_tokens(len(request.token_ids))
            return
        if self._is_complete:
            return
        is_ended_by_token = _is_ended_by_token(request, end)
        is_left_out = is_ended_by_token and not request.params.include_stop_str_in_output
        self._take_tokens(len(request.token_ids) - is_left_out)
        if isinstance(end.stop_reason, str) and not is_ended_by_token:
            found = find_stop(self._stops, self._longest_stop, self._join, self._before_newest, self._length)
            assert found is not None, "the newest token has completed it"
            self._length = found[0] + (len(found[1]) if request.params.include_stop_str_in_output else 0)
        else:
            self._append(self._stream.flush())
        self._is_complete = True

    def _take_tokens(self, end: int) -> None:
        """Take the request's tokens up to the one at `end`, the newest alone: strings are looked for in its text."""
        start = self._request.num_prompt_tokens + self._num_taken
        if end <= start:
            return
        if end - start > 1:
            self._append(self._stream.feed(self._request.token_ids[start : end - 1]))
        self._before_newest = self._length
        self._append(self._stream.step(self._request.token_ids[end - 1]))
        self._num_taken += end - start

    def _append(self, piece: str) -> None:
        if piece:
            self._length += len(piece)
            self._pieces.append(piece)
            self._ends.append(self._length)


def _is_ended_by_token(request: Request, end: End) -> bool:
    """By an EOS or stop token, not by a string in the text."""
    newest = request.token_ids[-1]
    if end.finish_reason != "stop" or newest not in request.stop_token_ids:
        return False
    return end.stop_reason == request.stop_reasons.get(newest, newest)
