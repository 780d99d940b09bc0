"""DetokenizerStream: token ids become text as they arrive, and there is no other way: a text is what its stream gave.

Owns incremental text. In the schemes that nearly all language models use a token stands for the same bytes wherever it
is (`token_bytes.py`), so a text is these bytes as UTF-8. For any other scheme a short window is decoded with and
without its newest token (`detokenizer_windows.py`). Invariant: pieces only ever add up, and no piece but the last ends
inside a character; bytes that are no UTF-8 become U+FFFD.

As vLLM's, the text of an output goes on where its prompt ended: SentencePiece's first space is taken off a text that
stands alone, and kept where a prompt is before it.
"""

import codecs
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from nanovllm.detokenizer_windows import JoinedPieces, StandingAlone, WindowPieces
from nanovllm.token_bytes import BytesOfTokens, TextsOfTokens, TokenTables

if TYPE_CHECKING:
    from nanovllm.tokenizer import Tokenizer

_UTF8 = codecs.getincrementaldecoder("utf-8")


class DetokenizerStream:
    """Text of one sequence of tokens, as they arrive.

    step, feed: take the next token, or the next tokens, and return the new text, "" while a character is incomplete.
    texts_here: token id -> what `step` would return for it now; holds also when the stream has gone on. flush: at the
    end of the sequence, what an incomplete character leaves: U+FFFD, or nothing.

    spaces_between_special_tokens=False puts special tokens beside each other without a space. follows_text: the
    sequence goes on after a prompt; otherwise it is a text by itself.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool = True,
        *,
        follows_text: bool = False,
    ) -> None:
        scheme = tokenizer.fixed_scheme
        pieces: Any  # of one of these kinds
        if scheme is not None:
            pieces = _FixedPieces(tokenizer.token_tables(skip_special_tokens))
            if scheme.num_spaces and not follows_text:
                pieces = StandingAlone(pieces, scheme.num_spaces)
        else:
            left_out = tokenizer.special_ids if skip_special_tokens else frozenset()
            pieces = WindowPieces(lambda ids: tokenizer.decode_whole(ids, skip_special_tokens), left_out)
        if not spaces_between_special_tokens:
            pieces = JoinedPieces(pieces, tokenizer.special_ids)
        self.step: Callable[[int], str] = pieces.step
        self.feed: Callable[[Sequence[int]], str] = pieces.feed
        self.texts_here: Callable[[], Callable[[int], str]] = pieces.texts_here
        self.flush: Callable[[], str] = pieces.flush


class _FixedPieces:
    def __init__(self, tables: TokenTables) -> None:
        self._bytes_of, self._text_of = tables
        self._utf8 = _UTF8("replace")
        self._is_inside = False  # a character, whose first bytes the decoder holds

    def step(self, token_id: int) -> str:
        text = None if self._is_inside else self._text_of[token_id]
        return self.feed((token_id,)) if text is None else text

    def feed(self, token_ids: Sequence[int]) -> str:
        bytes_of = self._bytes_of
        text = self._utf8.decode(b"".join([bytes_of[token_id] for token_id in token_ids]))
        self._is_inside = bool(self._utf8.getstate()[0])
        return text

    def texts_here(self) -> Callable[[int], str]:
        return partial(_decode_after, self._utf8.getstate(), self._bytes_of, self._text_of)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


def _decode_after(state: tuple[bytes, int], bytes_of: BytesOfTokens, text_of: TextsOfTokens, token_id: int) -> str:
    if not state[0] and (text := text_of[token_id]) is not None:
        return text
    utf8 = _UTF8("replace")
    utf8.setstate(state)
    return utf8.decode(bytes_of[token_id])
