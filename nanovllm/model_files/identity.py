"""What a model is: a hash of its files, so that a job that goes on does so with the same weights.

Owns the choice of what is hashed. Small files are read whole; of weights the beginning, which has the names and shapes
of tensors, and pieces throughout, so it takes no longer for a large model than for a small one. Invariant: the same
checkpoint has the same identity in any folder, on any machine.
"""

from hashlib import blake2b
from pathlib import Path

_WHOLE = 64 * 2**20  # files up to here are read whole
_PIECE = 64 * 2**10
_NUM_PIECES = 256
_MEANINGFUL = (".json", ".safetensors", ".gguf", ".model", ".jinja", ".txt")


def identify(model: Path) -> str:
    """model: a checkpoint's folder, or one file."""
    digest = blake2b(digest_size=16)
    files = sorted(model.iterdir()) if model.is_dir() else [model]
    for path in files:
        if path.suffix in _MEANINGFUL and path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            with path.open("rb") as file:
                if size <= _WHOLE:
                    digest.update(file.read())
                else:
                    for number in range(_NUM_PIECES):
                        file.seek((size - _PIECE) * number // (_NUM_PIECES - 1))
                        digest.update(file.read(_PIECE))
    return digest.hexdigest()
