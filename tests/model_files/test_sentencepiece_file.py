"""SentencePiece files, written here byte by byte."""

import struct
from pathlib import Path
from typing import Any

import pytest

from nanovllm.model_files.sentencepiece_file import read_sentencepiece
from nanovllm.model_files.tokenizer_files import load_tokenizer

PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256))]
PIECES += [(piece, -float(rank), 1) for rank, piece in enumerate(["▁ab", "ab", "▁", "a", "b"])]


def _varint(value: int) -> bytes:
    value %= 2**64
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def model_file(path: Path, trainer: dict[int, Any] | None = None, normalizer: dict[int, Any] | None = None) -> Path:
    content = b"".join(
        _field(1, _field(1, piece.encode()) + _field(2, score) + _field(3, kind)) for piece, score, kind in PIECES
    )
    for number, fields in ((2, {3: 2, 43: -1, **(trainer or {})}), (3, {1: b"identity", 4: 0, **(normalizer or {})})):
        content += _field(number, b"".join(_field(key, value) for key, value in fields.items()))
    path.write_bytes(content)
    return path


def test_a_folder_with_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    """BOS goes before a text and a space, too, as Llama 2 and Mistral have it; unknown characters are bytes."""
    model_file(tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text("{}")
    tokenizer = load_tokenizer(str(tmp_path), revision=None)
    assert tokenizer.encode("ab ab") == [1, 259, 259]
    assert tokenizer.encode("é") == [1, 261, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(tokenizer.encode("ab é ab")) == "ab é ab"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_prefix_and_ids_follow_the_file(tmp_path: Path) -> None:
    metadata = read_sentencepiece(model_file(tmp_path / "m", trainer={41: 2, 42: 1}, normalizer={3: 0}))
    assert not metadata["tokenizer.ggml.add_space_prefix"]
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (2, 1)
    assert "tokenizer.ggml.padding_token_id" not in metadata


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"trainer": {3: 1}}, "model type 1"),
        ({"normalizer": {2: b"map"}}, "a map of characters"),
        ({"normalizer": {4: 1}}, "removal of spaces"),
    ],
)
def test_other_kinds_are_refused_with_the_packages_to_install(
    tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    model_file(tmp_path / "tokenizer.model", **changes)
    with pytest.raises(NotImplementedError, match=rf"tokenizer\.model has {what}.*pip install sentencepiece protobuf"):
        load_tokenizer(str(tmp_path), revision=None)


def test_damaged_files_and_others_are_refused_by_name(tmp_path: Path) -> None:
    whole = model_file(tmp_path / "tokenizer.model").read_bytes()
    for content in (b"", b"IQ== 0\nIg== 1\n", whole[:-3], whole[:5], b"\xff" * 20, b"\n\x02\n\x09"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece model"):
            load_tokenizer(str(tmp_path), revision=None)


@pytest.mark.parametrize(
    ("files", "packages"),
    [
        (["tekken.json"], r"pip install 'nanovllm\[mistral\]'"),
        (["tokenizer.model", "tokenizer_config.json"], "pip install sentencepiece protobuf"),
    ],
)
def test_what_needs_a_package_names_it(tmp_path: Path, files: list[str], packages: str) -> None:
    """Also where the package is there: the files are damaged."""
    for name in files:
        (tmp_path / name).write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    with pytest.raises(ValueError, match=packages):
        load_tokenizer(str(tmp_path), revision=None)
