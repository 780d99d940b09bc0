"""PromptText: text that callers bring becomes token ids, within bounds of time and memory.

Owns what is wrong with a text before any tokenizer has seen it, and the early end of one that is far too long.
Invariant: an error names the item, and a text that cannot fit is not tokenized as a whole.
"""

from collections.abc import Callable

from nanovllm.engine.features.prompt_forms import PIECE, check_length


class PromptText:
    """encode: text to token ids, with the special tokens of a prompt or (add_special_tokens=False) without them; None
    without a tokenizer. max_tokens: what fits.
    """

    def __init__(self, encode: Callable[..., list[int]] | None, max_tokens: int) -> None:
        self._encode = encode
        self._max_tokens = max_tokens

    @property
    def is_known(self) -> bool:
        return self._encode is not None

    def read(self, text: str, name: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Raises ValueError for `name` if they cannot be made, or are certainly too many."""
        if self._encode is None:
            raise ValueError(f"{name}: text needs a tokenizer; pass token ids, or skip_tokenizer_init=False")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} holds U+{ord(text[error.start]):04X} at character {error.start}, which is half of a "
                "character, as text that was cut in UTF-16 or JSON leaves it: remove it"
            ) from None
        if len(text) > 8 * self._max_tokens + PIECE:
            check_length(text, self._encode, self._max_tokens, name)
        return self._encode(text, add_special_tokens=add_special_tokens)
