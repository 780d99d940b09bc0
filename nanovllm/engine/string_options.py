"""StringOptions: options of a request that are strings, as the tokens that they stand for.

Owns `stop` and `bad_words`, as far as they depend on the tokenizer. Invariant: an error names request, option and item.
"""

from collections.abc import Mapping

from nanovllm.engine.prompt_text import PromptText
from nanovllm.sampling_params import SamplingParams

MAX_STOP_STRINGS = 1_024
MAX_STOP_CHARACTERS = 65_536


class StringOptions:
    """special_tokens: those that are left out of texts, with their ids."""

    def __init__(self, text: PromptText, special_tokens: Mapping[str, int], vocab_size: int) -> None:
        self._text = text
        self._special_tokens = special_tokens
        self._vocab_size = vocab_size

    def read_stop(self, params: SamplingParams, name: str) -> dict[int, str]:
        """Those that are a special token, which has no text in the output: the token then ends it."""
        stops = params.stop or ()
        if not self._text.is_known:
            raise ValueError(f"{name}: stop strings need a tokenizer; use stop_token_ids, or skip_tokenizer_init=False")
        num_characters = sum(map(len, stops))
        if len(stops) > MAX_STOP_STRINGS or num_characters > MAX_STOP_CHARACTERS:
            raise ValueError(
                f"{name}: stop holds {len(stops)} strings of {num_characters} characters, which are looked for after "
                f"each token; {MAX_STOP_STRINGS} and {MAX_STOP_CHARACTERS} are the most"
            )
        if not params.skip_special_tokens:
            return {}
        tokens = ((self._special_tokens.get(stop, self._vocab_size), stop) for stop in stops)
        return {token_id: stop for token_id, stop in tokens if token_id < self._vocab_size}

    def read_bad_words(self, params: SamplingParams, name: str) -> tuple[tuple[int, ...], ...]:
        """Token sequences of the bad words: as they begin a text, and as they go on after a space.

        The second form counts where the space became part of the word's first token and changed nothing else.
        """
        if not self._text.is_known:
            raise ValueError(f"{name}: bad_words need a tokenizer; use logit_bias, or skip_tokenizer_init=False")
        sequences: dict[tuple[int, ...], None] = {}
        for i, word in enumerate(params.bad_words or ()):
            text, where = word.lstrip(), f"{name}: bad_words[{i}]"
            plain = tuple(self._text.read(text, where, add_special_tokens=False))
            spaced = tuple(self._text.read(" " + text, where, add_special_tokens=False))
            if not plain:
                raise ValueError(f"{name}: bad_words holds {word!r}, which has no tokens; leave it out")
            sequences[plain] = None
            if len(spaced) == len(plain) and spaced[0] != plain[0]:
                sequences[spaced] = None
        # A tokenizer may know more tokens than the model, which can never say those.
        return tuple(sequence for sequence in sequences if max(sequence) < self._vocab_size)
