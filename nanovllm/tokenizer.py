"""Tokenizer: text to token ids and back, by a Hugging Face tokenizer.

Owns special tokens around prompts. Does not own the files of tokenizers (`model_files/tokenizer_files.py`), how ids
become text (`detokenizer.py`) and conversations a prompt (`chat_template.py`). Invariant: `decode` gives what a stream
would.

transformers is imported only where it is needed: importing it takes longer than building a tokenizer.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers

from nanovllm.detokenizer import DetokenizerStream
from nanovllm.token_bytes import FixedScheme, TokenTables, find_fixed_scheme, make_tables


class Tokenizer:
    """One model's tokenizer. Built by `model_files/tokenizer_files.py`.

    hf: the transformers tokenizer, for all that is not wrapped here. eos_token_id, bos_token_id: None if it has none.
    """

    def __init__(
        self,
        load_hf: Callable[[], Any],
        backend: tokenizers.Tokenizer | None,
        *,
        eos_token_id: int | None,
        bos_token_id: int | None,
    ) -> None:
        """backend: the Rust tokenizer that `load_hf()` wraps, if it is one of those (all but a few old ones are)."""
        self._load_hf = load_hf
        self._backend = backend
        self.eos_token_id = eos_token_id
        self.bos_token_id = bos_token_id
        self._token_tables: dict[bool, TokenTables] = {}  # by skip_special_tokens

    @cached_property
    def hf(self) -> Any:
        return self._load_hf()

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model may have more rows (padding), never fewer."""
        return len(self.hf) if self._backend is None else self._backend.get_vocab_size()

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a plain prompt, with the special tokens that the model expects around it.

        A prompt that already starts with BOS, as one that came out of a chat template does, gets no second one.
        add_special_tokens=False: the ids of the text alone.
        """
        if not add_special_tokens:
            return self._encode(text, add_special_tokens=False)
        ids = self._encode(text)
        if self._adds_bos and ids[1:2] == [self.bos_token_id]:
            del ids[0]
        return ids

    def _encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if self._backend is None:
            return self.hf.encode(text, add_special_tokens=add_special_tokens)
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    @cached_property
    def _adds_bos(self) -> bool:
        return self.bos_token_id is not None and self._encode("")[:1] == [self.bos_token_id]

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The text of a conversation, special tokens and all. `options` and errors are `chat_template.render_chat`'s.

        Its token ids are those of `encode(text, add_special_tokens=False)`.
        """
        # A leaf: transformers and jinja2 are slow to import, and nothing but conversations needs them.
        from nanovllm.chat_template import render_chat

        return render_chat(self.hf, messages, **options)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of `render_chat`."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids. Bytes that are no UTF-8 become U+FFFD; ids that are no token become nothing."""
        stream = DetokenizerStream(self, skip_special_tokens)
        return stream.feed(token_ids) + stream.flush()

    def decode_whole(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        """As the package that the tokenizer comes from decodes it. For schemes that are no fixed ones."""
        if self._backend is not None:
            return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        return str(self.hf.decode(token_ids, **options))

    def to_json(self) -> str:
        """All of it as text in the format of the tokenizers package. Raises ValueError if it is not one of those."""
        if self._backend is None:
            raise ValueError("structured_outputs need a tokenizer of the tokenizers package; this one is Python code")
        return self._backend.to_str()

    @cached_property
    def fixed_scheme(self) -> FixedScheme | None:
        return find_fixed_scheme(self._backend)

    def token_tables(self, skip_special_tokens: bool) -> TokenTables:
        """Only where there is a `fixed_scheme`."""
        if skip_special_tokens not in self._token_tables:
            assert self._backend is not None and self.fixed_scheme is not None
            left_out = self.special_ids if skip_special_tokens else frozenset[int]()
            self._token_tables[skip_special_tokens] = make_tables(self._backend, self.fixed_scheme, left_out)
        return self._token_tables[skip_special_tokens]

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The tokens that `skip_special_tokens` leaves out, and their ids."""
        if self._backend is None:
            return dict(zip(self.hf.all_special_tokens, self.hf.all_special_ids, strict=True))
        added = self._backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())


def load_tokenizer(model: str, *, revision: str | None) -> Tokenizer:
    """Of a folder, a file or a name, whose reader this class does not know: see `model_files/tokenizer_files.py`."""
    from nanovllm.model_files import tokenizer_files

    return tokenizer_files.load_tokenizer(model, revision=revision)
