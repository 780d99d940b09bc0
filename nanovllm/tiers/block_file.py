"""A KV block as a file: written whole or not at all, and checked when it is read.

Owns the file's form and its checksum. A file has a line of JSON (what it is, how long, its checksum) and the block's
bytes. Invariant: a file of that name is whole, since it is renamed when it is; so processes may write the same block at
the same time, or end in the middle of it, and who finds a file that does not fit its checksum takes it away.

The checksum is BLAKE2b of a sum and an exclusive or for each 32 KiB: any flipped bit or missing piece shows, at the
speed of memory. It is no signature: whoever can write into the folder is trusted.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

_WORDS = 4096  # of 8 bytes, in one sum
_HEADER_BYTES = 512


def checksum(data: np.ndarray) -> str:
    """data: uint8, contiguous."""
    whole = data.size // (8 * _WORDS) * 8 * _WORDS
    rows = data[:whole].view(np.uint64).reshape(-1, _WORDS)
    digest = blake2b(np.add.reduce(rows, axis=1).tobytes(), digest_size=16)
    digest.update(np.bitwise_xor.reduce(rows, axis=1).tobytes())
    digest.update(data[whole:].tobytes())
    return digest.hexdigest()


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
    """Whether this is that block, unharmed. A file that is not is removed; one that is counts as used now."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(_HEADER_BYTES))
            data = np.fromfile(file, dtype=np.uint8)
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        header, data = {}, np.zeros(0, np.uint8)
    with suppress(OSError):
        if header == {**about, "bytes": data.size, "checksum": checksum(data)}:
            os.utime(path)
            return True
        path.unlink()
    return False


def read_block(path: Path, into: np.ndarray) -> None:
    """into: uint8, of the block's size. Raises OSError if the file is gone, ValueError if it has another size."""
    with path.open("rb") as file:
        file.seek(_HEADER_BYTES)
        if file.readinto(into.data) != into.size:
            raise ValueError(f"{path} has lost a part since it was checked")
