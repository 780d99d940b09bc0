"""Text as tokens arrive, where a token's text depends on the tokens beside it.

Owns a short window of tokens, which is decoded with and without its newest one (WindowPieces, for schemes that are no
fixed ones), first spaces of a text that follows no other (StandingAlone), and special tokens that follow each other
without a space (JoinedPieces). Invariant: as of
`DetokenizerStream`, whose work this is.
"""

from collections.abc import Callable, Sequence
from typing import Any

_MAX_WAITING = 16  # tokens of one character, and then some: a window without text for longer holds no character


class WindowPieces:
    """[ ids whose text was the last piece | ids without text yet ]"""

    def __init__(self, decode: Callable[[list[int]], str], left_out: frozenset[int]) -> None:
        self._decode = decode
        self._left_out = left_out
        self._window: list[int] = []
        self._window_text = ""
        self._num_emitted = 0  # leading ids of the window whose text, `_window_text`, is out

    def feed(self, token_ids: Sequence[int]) -> str:
        return "".join([self.step(token_id) for token_id in token_ids])

    def step(self, token_id: int) -> str:
        if token_id in self._left_out:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        is_waiting = text.endswith("\ufffd") and len(self._window) - self._num_emitted < _MAX_WAITING
        if is_waiting or len(text) <= len(self._window_text):
            return ""
        piece = text[len(self._window_text) :]
        del self._window[: self._num_emitted]
        self._num_emitted = len(self._window)
        self._window_text = self._decode(self._window)
        return piece

    def texts_here(self) -> Callable[[int], str]:
        window, before = list(self._window), len(self._window_text)

        def text_of(token_id: int) -> str:
            text = self._decode([*window, token_id]) if token_id not in self._left_out else ""
            return "" if text.endswith("\ufffd") else text[before:]

        return text_of

    def flush(self) -> str:
        return self._decode(self._window)[len(self._window_text) :]


class StandingAlone:
    """A text that follows no other loses its first spaces. pieces: of another kind; num_spaces: how many at most."""

    def __init__(self, pieces: Any, num_spaces: int) -> None:
        self._pieces = pieces
        self._num_spaces = num_spaces
        self.texts_here, self.flush = pieces.texts_here, pieces.flush

    def step(self, token_id: int) -> str:
        return self._without_first_spaces(self._pieces.step(token_id))

    def feed(self, token_ids: Sequence[int]) -> str:
        return self._without_first_spaces(self._pieces.feed(token_ids))

    def _without_first_spaces(self, text: str) -> str:
        while text.startswith(" ") and self._num_spaces:
            text = text[1:]
            self._num_spaces -= 1
        if text:
            self._num_spaces = 0
        return text


class JoinedPieces:
    """pieces: of one of the other kinds; joined_ids: the special tokens."""

    def __init__(self, pieces: Any, joined_ids: frozenset[int]) -> None:
        self._step = pieces.step
        self._joined_ids = joined_ids
        self._is_after_joined = False
        self.texts_here, self.flush = pieces.texts_here, pieces.flush

    def step(self, token_id: int) -> str:
        piece: str = self._step(token_id)
        is_joined = token_id in self._joined_ids
        if is_joined and self._is_after_joined:
            piece = piece.removeprefix(" ")
        self._is_after_joined = is_joined
        return piece

    def feed(self, token_ids: Sequence[int]) -> str:
        return "".join([self.step(token_id) for token_id in token_ids])
