"""Token bytes: what each token of a vocabulary stands for, in the schemes where that is the same wherever it is.

GPT-2's byte-level tokens and SentencePiece's with byte fallback are such schemes, and nearly all models use one.
Owns which scheme a tokenizer has, and its tables. Invariant: a text is the bytes of its tokens, one after the other.
"""

import json
import re
from collections.abc import Callable
from typing import NamedTuple

import tokenizers

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class BytesOfTokens(dict[int, bytes]):
    """Token id -> UTF-8 bytes, found when asked for; nothing for ids that are no token, or left out."""

    def __init__(self, backend: tokenizers.Tokenizer, to_bytes: Callable[[str], bytes], left_out: frozenset[int]):
        super().__init__(dict.fromkeys(left_out, b""))
        self._backend = backend
        self._to_bytes = to_bytes

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        value = self[token_id] = b"" if token is None else self._to_bytes(token)
        return value


class TextsOfTokens(dict[int, str | None]):
    """Token id -> its text, where that begins and ends with a character; else None."""

    def __init__(self, bytes_of: BytesOfTokens) -> None:
        super().__init__()
        self._bytes_of = bytes_of

    def __missing__(self, token_id: int) -> str | None:
        value: str | None
        try:
            value = self._bytes_of[token_id].decode()
        except UnicodeDecodeError:
            value = None
        self[token_id] = value
        return value


class TokenTables(NamedTuple):
    """What each token stands for, shared by all streams of a tokenizer that leave out the same tokens."""

    bytes_of: BytesOfTokens
    text_of: TextsOfTokens


class FixedScheme(NamedTuple):
    """How a token becomes bytes; num_spaces: how many a text that stands alone loses at its beginning."""

    to_bytes: Callable[[str], bytes]
    num_spaces: int


def make_tables(backend: tokenizers.Tokenizer, scheme: FixedScheme, left_out: frozenset[int]) -> TokenTables:
    """left_out: tokens that have no text."""
    bytes_of = BytesOfTokens(backend, scheme.to_bytes, left_out)
    return TokenTables(bytes_of, TextsOfTokens(bytes_of))


def find_fixed_scheme(backend: tokenizers.Tokenizer | None) -> FixedScheme | None:
    """The scheme of a tokenizer's decoder; None where a token's text depends on the tokens beside it."""
    if backend is None or backend.decoder is None:
        return None
    decoder = json.loads(backend.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    replaced: list[tuple[str, str]] = []
    is_byte_level = has_byte_tokens = False
    num_spaces = 0
    for index, step in enumerate(steps):
        match step:
            case {"type": "ByteLevel"}:
                is_byte_level = True
            case {"type": "ByteFallback"}:
                has_byte_tokens = True
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if len(old) == 1:
                replaced.append((old, new))
            case {"type": "Fuse"}:
                pass
            case {"type": "Strip", "content": " ", "start": int(num_spaces), "stop": 0} if (
                index == len(steps) - 1 and steps[index - 1]["type"] == "Fuse"
            ):
                pass
            case _:
                return None
    if is_byte_level:
        return FixedScheme(_byte_level, 0) if len(steps) == 1 else None

    def to_bytes(token: str) -> bytes:
        for old, new in replaced:
            token = token.replace(old, new)
        byte = _BYTE_TOKEN.fullmatch(token) if has_byte_tokens else None
        return bytes([int(byte[1], 16)]) if byte else token.encode()

    return FixedScheme(to_bytes, num_spaces) if "Fuse" in [step["type"] for step in steps] else None


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:  # an added token, which is stored as it is
        return token.encode()


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: bytes that print stand for themselves, the other 68 for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()
