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
    """W2: a file that lost its end, wherever, is refused when it is opened."""
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
