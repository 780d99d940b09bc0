"""GGUFFile: what is inside a GGUF file, read in milliseconds and without torch.

Owns the container format (header, metadata, tensor table; GGUF versions 2 and 3, little endian). Does not own what
the metadata mean: `weights/gguf.py` turns them into a model config, `model_files/gguf_tokenizer.py` into a tokenizer.
The `gguf` package has a reader too, which takes seconds on a vocabulary of 50,000 strings because it maps each of them
as an array; its tables of type sizes are used here, its reader is not.

Invariant: every tensor that `tensors` lists lies inside the file, so reading one cannot fail half-way through a load.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    magic version #tensors #metadata | key type value ... | name shape type offset ... | padding | tensor bytes ...
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

# Type numbers of metadata values, and the letters that `struct` and NumPy have for them.
_SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table. shape: as PyTorch has it (rows first), in elements."""

    name: str
    shape: tuple[int, ...]
    quantization: GGMLQuantizationType
    start: int  # first byte in the file
    num_bytes: int


class GGUFFile:
    """An opened GGUF file. Raises ValueError that names the file if it is not one, is damaged, or is truncated.

    metadata: key -> str, int, float, bool, a list of them, or a NumPy array for an array of numbers.
    tensors: name -> TensorInfo, in the file's order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Copy-on-write: torch refuses to wrap read-only memory without a warning, and nobody writes to it.
        self._bytes = np.memmap(path, dtype=np.uint8, mode="c") if path.stat().st_size else np.empty(0, np.uint8)
        self._view = self._bytes.data
        self._position = 0
        try:
            self.metadata, self.tensors = self._parse()
        except (struct.error, UnicodeDecodeError, EOFError, KeyError) as error:
            raise ValueError(
                f"{path} is truncated or damaged: its header breaks off at byte {self._position}"
            ) from error

    def read_rows(self, info: TensorInfo) -> np.ndarray:
        """The tensor's bytes, mapped and not copied. Returns uint8 [rows, bytes of a row] (one row for a vector)."""
        rows = prod(info.shape[:-1])
        return self._bytes[info.start : info.start + info.num_bytes].reshape(rows, -1)

    def _parse(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if bytes(self._view[:4]) != b"GGUF":
            raise ValueError(f"{self.path} is not a GGUF file: it starts with {bytes(self._view[:4])!r}")
        self._position = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"{self.path} has GGUF version {version}; versions 2 and 3, little endian, are read")
        num_tensors, num_metadata = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_metadata):
            key = self._string()
            metadata[key] = self._value(self._scalar("I"))
        raw_infos = []
        for _ in range(num_tensors):
            name = self._string()
            shape = tuple(self._scalar("Q") for _ in range(self._scalar("I")))[::-1]
            raw_infos.append((name, shape, self._scalar("I"), self._scalar("Q")))
        alignment = metadata.get("general.alignment", 32)
        data_start = -(-self._position // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, type_number, offset in raw_infos:
            if name in tensors:
                raise ValueError(f"{self.path} holds tensor {name} twice")
            tensors[name] = self._tensor_info(name, shape, type_number, data_start + offset)
        return metadata, tensors

    def _tensor_info(self, name: str, shape: tuple[int, ...], type_number: int, start: int) -> TensorInfo:
        try:
            quantization = GGMLQuantizationType(type_number)
        except ValueError:
            raise ValueError(
                f"{self.path}: tensor {name} has type {type_number}, which the installed gguf package does not know: "
                "update it (pip install -U gguf) or use a file of another quantization"
            ) from None
        block_size, block_bytes = GGML_QUANT_SIZES[quantization]
        if not shape or shape[-1] % block_size:
            raise ValueError(f"{self.path}: tensor {name} of shape {shape} is not made of {quantization.name} blocks")
        num_bytes = prod(shape) // block_size * block_bytes
        if start + num_bytes > len(self._bytes):
            raise ValueError(
                f"{self.path} is truncated: tensor {name} ends at byte {start + num_bytes} of {len(self._bytes)}; "
                "fetch the file again"
            )
        return TensorInfo(name, shape, quantization, start, num_bytes)

    def _scalar(self, code: str) -> Any:
        layout = struct.Struct("<" + code)
        (value,) = layout.unpack_from(self._view, self._position)
        self._position += layout.size
        return value

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        # A vocabulary is one array of 10^5 strings, so this loop looks up nothing but local names.
        unpack: Callable[..., tuple[int]] = struct.Struct("<Q").unpack_from
        view, position, size = self._view, self._position, len(self._view)
        strings = []
        for _ in range(count):
            (length,) = unpack(view, position)
            position += 8
            end = position + length
            if end > size:
                raise EOFError
            strings.append(str(view[position:end], "utf-8"))
            position = end
        self._position = position
        return strings

    def _value(self, type_number: int) -> Any:
        if type_number == _STRING:
            return self._string()
        if type_number != _ARRAY:
            return self._scalar(_SCALAR_FORMATS[type_number])
        item_type, count = self._scalar("I"), self._scalar("Q")
        if item_type == _STRING:
            return self._strings(count)
        if item_type == _ARRAY:
            return [self._value(_ARRAY) for _ in range(count)]
        dtype = np.dtype("<" + _SCALAR_FORMATS[item_type])
        end = self._position + count * dtype.itemsize
        if end > len(self._view):
            raise EOFError
        array = np.frombuffer(self._view, dtype, count, self._position)
        self._position = end
        return array
