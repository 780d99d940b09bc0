"""read_sentencepiece: what is in a SentencePiece tokenizer.model, by the keys that a GGUF file has for the same.

Owns the little of the protobuf format that such a file needs, so that neither sentencepiece nor protobuf have to be
installed. Does not own the tokenizer that is built of it (`gguf_tokenizer.py`). Invariant: BPE models without a
normalization of characters are read, as Llama, Mistral and Gemma have them; all others are refused by name.

Format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto

    ModelProto   1: piece {1: text  2: score  3: type}   2: trainer {3: model type  40 to 43: ids}   3: normalizer
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_BPE = 2
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of the whole
_MODEL_TYPE = 3
_DEFAULT_IDS = {"unknown": 0, "bos": 1, "eos": 2, "padding": -1}  # fields 40 to 43 of the trainer
_CHARACTER_MAP, _ADDS_PREFIX, _REMOVES_SPACES = 2, 3, 4  # fields of the normalizer


def read_sentencepiece(path: Path) -> dict[str, Any]:
    """Metadata under "tokenizer.ggml.". Raises ValueError if it is not such a file, NotImplementedError by kind."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(path.read_bytes()):
            if number == _PIECE:
                fields = dict(_fields(value))
                pieces.append((fields[1].decode(), fields.get(2, 0.0), fields.get(3, 1)))
            elif number == _TRAINER:
                trainer = dict(_fields(value))
            elif number == _NORMALIZER:
                normalizer = dict(_fields(value))
        texts, scores, types = zip(*pieces, strict=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(
            f"{path} is not a SentencePiece model, or is damaged; add the model's tokenizer.json, or name another "
            "folder with tokenizer="
        ) from error
    for what, is_supported in (
        (f"model type {trainer.get(_MODEL_TYPE, 1)}, not BPE", trainer.get(_MODEL_TYPE, 1) == _BPE),
        ("a map of characters", not normalizer.get(_CHARACTER_MAP)),
        ("removal of spaces", not normalizer.get(_REMOVES_SPACES, True)),
    ):
        if not is_supported:
            raise NotImplementedError(
                f"{path} has {what}, which is not read here: have transformers write a tokenizer.json beside it, with "
                "sentencepiece and protobuf installed (pip install sentencepiece protobuf)"
            )
    ids = {
        name: _signed(trainer.get(40 + index, default)) for index, (name, default) in enumerate(_DEFAULT_IDS.items())
    }
    keys = {
        "model": "llama",
        "tokens": list(texts),
        "scores": np.array(scores, np.float32),
        "token_type": np.array(types, np.int32),
        "add_space_prefix": bool(normalizer.get(_ADDS_PREFIX, True)),
        **{f"{name}_token_id": token_id for name, token_id in ids.items() if 0 <= token_id < len(texts)},
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field: int for varints, float for 32 bits, bytes for what has a length."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, position = _varint(message, position)
            yield number, value
        elif kind == 2:
            length, position = _varint(message, position)
            if position + length > len(message):
                raise ValueError("a field is longer than what is left")
            yield number, message[position : position + length]
            position += length
        elif kind == 5:
            yield number, struct.unpack_from("<f", message, position)[0]
            position += 4
        elif kind == 1:
            position += 8
        else:
            raise ValueError("a kind of field that is none")


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
