"""GGUFFile: what is inside a GGUF file, or a model split over several, read in milliseconds and without torch.

Owns the container format (header, metadata, tensor table; GGUF versions 2 and 3, little endian). Does not own what the
metadata mean: `weights/gguf.py` turns them into a model config, `model_files/gguf_tokenizer.py` into a tokenizer.
The `gguf` package has a reader too, which takes seconds on a vocabulary of 50,000 strings because it maps each of them
as an array; its tables of type sizes are used here, its reader is not.

Invariant: every tensor that `tensors` lists lies inside its file, so reading one cannot fail half-way through a load.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    magic version #tensors #metadata | key type value ... | name shape type offset ... | padding | tensor bytes ...
"""

import mmap
import re
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
_MAX_DIMENSIONS = 4  # ggml's
_MAX_NESTING = 4  # arrays in arrays; nobody writes more than one
_MAX_ALIGNMENT = 2**16
_SHARD_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table. shape: as PyTorch has it (rows first), in elements. shard: which file it is in."""

    name: str
    shape: tuple[int, ...]
    quantization: GGMLQuantizationType
    start: int  # first byte in the file
    num_bytes: int
    shard: int = 0


class GGUFFile:
    """An opened GGUF model. Raises ValueError that names the file if it is not one, is damaged, or is truncated.

    path: the file, or any one of several that a model is split over. metadata: key -> str, int, float, bool, a list of
    them, or a NumPy array for an array of numbers; those of the first file. tensors: name -> TensorInfo, in the files'
    order.
    """

    def __init__(self, path: Path) -> None:
        self._shards = [_Shard(shard, number) for number, shard in enumerate(_shard_paths(path))]
        self.path = self._shards[0].path
        self.metadata = self._shards[0].metadata
        self.tensors: dict[str, TensorInfo] = {}
        for shard in self._shards:
            count = shard.metadata.get("split.count", 1)
            if count != len(self._shards):
                raise ValueError(
                    f"{shard.path}: split.count is {count!r}, but by its name it is one of {len(self._shards)} files; "
                    "a split model needs all of them, with the names that they were given (-00001-of-00003.gguf, say)"
                )
            if twice := self.tensors.keys() & shard.tensors.keys():
                raise ValueError(f"{shard.path} holds tensor {min(twice)}, as another file of the model does")
            self.tensors |= shard.tensors

    def read_rows(self, info: TensorInfo) -> np.ndarray:
        """The tensor's bytes, mapped and not copied. Returns uint8 [rows, bytes of a row] (one row for a vector)."""
        rows = prod(info.shape[:-1])
        return self._shards[info.shard].bytes[info.start : info.start + info.num_bytes].reshape(rows, -1)

    def forget_pages(self, info: TensorInfo) -> None:
        """Let the system drop what of a tensor it read from the disk: it can read it again."""
        self._shards[info.shard].forget_pages(info.start, info.start + info.num_bytes)


def _shard_paths(path: Path) -> list[Path]:
    """All files of the model of which `path` is one, by its name. Raises ValueError that names a missing one."""
    name = _SHARD_NAME.fullmatch(path.name)
    if name is None or int(name[3]) < 2:
        return [path]
    paths = [path.with_name(f"{name[1]}-{number:05}-of-{name[3]}.gguf") for number in range(1, int(name[3]) + 1)]
    for shard in paths:
        if not shard.is_file():
            raise ValueError(f"{shard} is missing beside {path.name}: fetch all {len(paths)} files of the model")
    return paths


class _Shard:
    """One file: its metadata, and the table of its tensors."""

    def __init__(self, path: Path, number: int) -> None:
        self.path = path
        self._number = number
        self._map: mmap.mmap | None = None
        self.bytes = np.empty(0, np.uint8)
        try:
            with path.open("rb") as file:
                # Copy-on-write: torch refuses to wrap read-only memory without a warning, and nobody writes to it.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self.bytes = np.frombuffer(self._map, np.uint8)
        except ValueError:  # an empty file cannot be mapped
            pass
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        self._view = self.bytes.data
        self._position = 0
        self._reading = "the header"
        try:
            self.metadata, self.tensors = self._parse()
        except (struct.error, UnicodeDecodeError, EOFError) as error:
            raise ValueError(
                f"{path} is truncated or damaged: it breaks off in {self._reading}, at byte {self._position}"
            ) from error

    def forget_pages(self, start: int, end: int) -> None:
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages; neighbours share the others
        end = end // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and start < end and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def _parse(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if bytes(self._view[:4]) != b"GGUF":
            raise ValueError(f"{self.path} is not a GGUF file: it starts with {bytes(self._view[:4])!r}")
        self._position = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"{self.path} has GGUF version {version}; versions 2 and 3, little endian, are read")
        num_tensors, num_metadata = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, Any] = {}
        for number in range(num_metadata):
            self._reading = f"metadata {number + 1} of {num_metadata}"
            key = self._string()
            self._reading = f"metadata {key}"
            if key in metadata:
                raise ValueError(f"{self.path} holds metadata {key} twice")
            metadata[key] = self._value(self._scalar("I"))
        raw_infos = []
        for number in range(num_tensors):
            self._reading = f"tensor {number + 1} of {num_tensors}"
            name = self._string()
            self._reading = f"the description of tensor {name}"
            num_dimensions = self._scalar("I")
            if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
                raise ValueError(f"{self.path}: tensor {name} has {num_dimensions} dimensions; 1 to 4 can be")
            shape = tuple(self._scalar("Q") for _ in range(num_dimensions))[::-1]
            raw_infos.append((name, shape, self._scalar("I"), self._scalar("Q")))
        alignment = metadata.get("general.alignment", 32)
        if isinstance(alignment, bool) or not isinstance(alignment, int) or not 1 <= alignment <= _MAX_ALIGNMENT:
            raise ValueError(f"{self.path}: general.alignment must be from 1 to {_MAX_ALIGNMENT}, got {alignment!r}")
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
        if 0 in shape or shape[-1] % block_size:
            raise ValueError(f"{self.path}: tensor {name} of shape {shape} is not made of {quantization.name} blocks")
        num_bytes = prod(shape) // block_size * block_bytes
        if start + num_bytes > len(self.bytes):
            raise ValueError(
                f"{self.path} is truncated: tensor {name} ends at byte {start + num_bytes} of {len(self.bytes)}; "
                "fetch the file again"
            )
        return TensorInfo(name, shape, quantization, start, num_bytes, self._number)

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

    def _value(self, type_number: int, depth: int = 0) -> Any:
        if type_number == _STRING:
            return self._string()
        if type_number != _ARRAY:
            return self._scalar(self._format(type_number))
        item_type, count = self._scalar("I"), self._scalar("Q")
        if item_type == _STRING:
            return self._strings(count)
        if item_type == _ARRAY:
            if depth == _MAX_NESTING:
                raise ValueError(f"{self.path}: {self._reading} has arrays in arrays, more than {_MAX_NESTING} deep")
            return [self._value(_ARRAY, depth + 1) for _ in range(count)]
        dtype = np.dtype("<" + self._format(item_type))
        end = self._position + count * dtype.itemsize
        if end > len(self._view):
            raise EOFError
        array = np.frombuffer(self._view, dtype, count, self._position)
        self._position = end
        return array

    def _format(self, type_number: int) -> str:
        if type_number not in _SCALAR_FORMATS:
            raise ValueError(f"{self.path} is damaged: {self._reading} has type {type_number}, which is none")
        return _SCALAR_FORMATS[type_number]
