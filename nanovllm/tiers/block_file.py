"""A KV block as a file: written whole or not at all, and checked when it is read.

Owns the file's form and its checksum. A file has a line of JSON (what it is, how long, its checksum) and the block's
bytes. Invariant: a file of that name is whole, since it is renamed when it is; so processes may write the same block at
the same time, or end in the middle of it, and who finds a file that does not fit its checksum takes it away.

The checksum is BLAKE2b of a sum and an exclusive or for each 32 KiB: any flipped bit or missing piece shows, at the
speed of memory. It is no signature: whoever can write into the folder is trusted.
"""

import json
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

_WORDS = 4096  # of 8 bytes, in one sum
_PIECE_BYTES = 32 * 8 * _WORDS  # read at a time: it stays in a core's cache
_HEADER_BYTES = 512
_buffers = threading.local()  # a piece for each thread that checks: fresh memory for each file would take longer


def checksum(data: np.ndarray) -> str:
    """data: uint8, contiguous."""
    digest = blake2b(digest_size=16)
    for start in range(0, data.size, _PIECE_BYTES):
        _add(digest, data[start : start + _PIECE_BYTES])
    return digest.hexdigest()


def _add(digest: Any, piece: np.ndarray) -> None:
    whole = piece.size // (8 * _WORDS) * 8 * _WORDS
    rows = piece[:whole].view(np.uint64).reshape(-1, _WORDS)
    digest.update(np.add.reduce(rows, axis=1).tobytes())
    digest.update(np.bitwise_xor.reduce(rows, axis=1).tobytes())
    digest.update(piece[whole:].tobytes())


def write_block(path: Path, data: np.ndarray, about: Mapping[str, Any]) -> None:
    """data: uint8, contiguous. about: what a reader must expect. Raises OSError, and leaves nothing then."""
    header = json.dumps({**about, "bytes": data.size, "checksum": checksum(data)}).encode()
    assert len(header) < _HEADER_BYTES, "a header of a fixed length keeps the block aligned"
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with new.open("wb") as file:
            file.write(header.ljust(_HEADER_BYTES - 1) + b"\n")
            file.write(data.data)
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def is_good(path: Path, about: Mapping[str, Any]) -> bool:
    """Whether this is that block, unharmed. A file that is not is removed."""
    header, size, digest = {}, 0, blake2b(digest_size=16)
    try:
        with path.open("rb", buffering=0) as file:
            header = json.loads(file.read(_HEADER_BYTES))
            while num_read := _read_piece(file, digest):
                size += num_read
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        header = {}
    with suppress(OSError):
        if header == {**about, "bytes": size, "checksum": digest.hexdigest()}:
            return True
        path.unlink()
    return False


def _read_piece(file: Any, digest: Any) -> int:
    """Add the next piece of a file to its checksum; returns how many bytes that were."""
    if not hasattr(_buffers, "piece"):
        _buffers.piece = np.empty(_PIECE_BYTES, np.uint8)
    piece, size = _buffers.piece, 0
    while size < _PIECE_BYTES and (num_read := file.readinto(piece[size:].data)):
        size += num_read
    _add(digest, piece[:size])
    return size


def read_block(path: Path, into: np.ndarray) -> None:
    """into: uint8, of the block's size. Raises OSError if the file is gone, ValueError if it has another size."""
    with path.open("rb", buffering=0) as file:
        file.seek(_HEADER_BYTES)
        size = 0
        while size < into.size and (num_read := file.readinto(into[size:].data)):
            size += num_read
        if size != into.size:
            raise ValueError(f"{path} has lost a part since it was checked")
