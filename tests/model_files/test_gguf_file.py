import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from nanovllm.model_files.gguf_file import GGUFFile
from tests.gguf_files import Quantization, byte_level_keys, metadata, tiny_tensors, write_gguf


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_gguf(
        tmp_path / "m.gguf", "llama", metadata("llama") | byte_level_keys(), tiny_tensors(), Quantization.Q8_0
    )


def test_reads_what_the_gguf_package_reads(path: Path) -> None:
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = ours.metadata[key]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert info.quantization == tensor.tensor_type
        assert ours.read_rows(info).tobytes() == tensor.data.tobytes()


def test_refuses_another_format(tmp_path: Path) -> None:
    for content in (b"", b"GG", b"PK\x03\x04 not a model"):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.gguf is not a GGUF file"):
            GGUFFile(tmp_path / "x.gguf")


def test_every_truncation_is_an_error_that_names_the_file(path: Path) -> None:
    """A file that lost its end, wherever, is refused when it is opened."""
    content = path.read_bytes()
    for size in [*range(4, 400, 7), *range(400, len(content) - 1, len(content) // 40), len(content) - 40]:
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"m\.gguf"):
            GGUFFile(path)


def test_truncated_tensor_is_named(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-200])
    with pytest.raises(ValueError, match=r"truncated: tensor blk\.1\.\w+\.weight"):
        GGUFFile(path)


def test_unknown_version_is_refused(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4:8] = (9).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match="version 9"):
        GGUFFile(path)


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


_NESTED = struct.pack("<IQ", 9, 1) * 3000 + struct.pack("<IQ", 4, 0)


@pytest.mark.parametrize(
    "key, kind, value",
    [
        *((b"general.alignment", 4, struct.pack("<I", alignment)) for alignment in (0, 2**31)),
        (b"general.alignment", 5, struct.pack("<i", -1)),
        (b"general.alignment", 6, struct.pack("<f", 1.5)),
        (b"general.alignment", 8, _text(b"a")),
        (b"general.alignment", 9, struct.pack("<IQII", 4, 2, 1, 2)),
        (b"general.alignment", 7, b"\x01"),
        (b"k", 9, _NESTED),
        (b"k", 99, b""),
        (b"k", 9, struct.pack("<IQ", 99, 1)),
        (b"k", 9, struct.pack("<IQ", 8, 2**60)),
        (b"k", 9, struct.pack("<IQ", 9, 2**60)),
        (b"k", 9, struct.pack("<IQ", 10, 2**60)),
        (b"k", 8, struct.pack("<Q", 2**63)),
        (b"k", 8, _text(b"\xff")),
    ],
)
def test_damaged_metadata_are_refused_by_file_and_key(tmp_path: Path, key: bytes, kind: int, value: bytes) -> None:
    path = tmp_path / "m.gguf"
    tensor = _text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 0)
    path.write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + _text(key) + struct.pack("<I", kind) + value + tensor + b"\0" * 64
    )
    with pytest.raises(ValueError, match=rf"m\.gguf.*{key.decode()}") as error:
        GGUFFile(path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "tensor, complaint",
    [
        (struct.pack("<I", 0), "has 0 dimensions"),
        (struct.pack("<I", 2**31), "has 2147483648 dimensions"),
        (struct.pack("<IQIQ", 1, 0, 0, 0), r"of shape \(0,\)"),
        (struct.pack("<IQIQ", 1, 2**62, 0, 0), "truncated: tensor t ends"),
        (struct.pack("<IQIQ", 1, 4, 0, 2**62), "truncated: tensor t ends"),
        (struct.pack("<IQIQ", 1, 4, 999, 0), "tensor t has type 999"),
        (struct.pack("<IQIQ", 1, 4, 2, 0), "not made of Q4_0 blocks"),
    ],
)
def test_tensors_that_cannot_be_are_refused_by_name(tmp_path: Path, tensor: bytes, complaint: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + _text(b"t") + tensor + b"\0" * 64)
    with pytest.raises(ValueError, match=complaint):
        GGUFFile(path)
