"""PrefixStore: blocks of prefixes that were used again, in a folder that outlives the process.

Owns what the folder is called and what is in it, as the planner sees it; blocks are written and read by the workers
(`mover.py`). Invariant: a block that it names has been read once and found to be good, in this process.

A folder is of one model (the hash of its files), form of its weights and KV, and rank; a file's name is the hash of its
block and all before it. Only prefixes of the weights that the model came with are kept, of requests without a salt:
other roots of hashes mean nothing in another process.
"""

import json
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from nanovllm.config import NamedModule, ResolvedConfig
from nanovllm.model_files.identity import identify
from nanovllm.tiers.block_file import is_good

_FORMAT = 1  # of what stands in a block: whoever changes how keys and values are computed or laid out raises it
_NUM_THREADS = 16  # that check files: reading and adding up leave the interpreter to others
_NUM_AHEAD = 64  # blocks whose check stands before those of a request's
_PATIENCE_SECONDS = 0.002  # that a plan waits for them


def open_folders(config: ResolvedConfig, model: Path) -> list[Path]:
    """The folder of each rank's blocks, made if it is not there. model: where the checkpoint is, whatever its name.

    Raises OSError; and ValueError for a model of this process, which no file need say anything of.
    """
    if isinstance(config.model, NamedModule):
        raise ValueError("prefix_store knows a model by its files, and one of this process has none: leave it out")
    about = {
        "format": _FORMAT,
        "model": identify(model),
        "seed": config.seed if config.load_format == "dummy" else None,
        "quantization": config.quantization,
        "dtype": config.dtype,
        "kv_cache_dtype": config.kv_cache_dtype,
        "block_size": config.block_size,
        "ranks": config.tensor_parallel_size,
    }
    text = json.dumps(about)
    folder = Path(config.prefix_store or "") / blake2b(text.encode(), digest_size=16).hexdigest()
    folders = [folder / f"rank{rank}" for rank in range(config.tensor_parallel_size)]
    for one in folders:
        one.mkdir(parents=True, exist_ok=True)
    (folder / "about.json").write_text(text)
    return folders


def path_of(folder: Path, block_hash: bytes) -> Path:
    return folder / f"{block_hash.hex()}.kv"


def newest(folder: Path) -> list[bytes]:
    """The hashes of a folder's blocks, those that were used last first. Of a folder that somebody removed, none."""
    found = []
    with suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            if entry.name.endswith(".kv"):
                with suppress(OSError, ValueError):  # gone meanwhile, or not ours
                    found.append((entry.stat().st_mtime_ns, bytes.fromhex(entry.name.removesuffix(".kv"))))
    return [block_hash for _, block_hash in sorted(found, reverse=True)]


def _exists(folder: Path, block_hash: bytes) -> bool:
    return os.path.exists(f"{folder}/{block_hash.hex()}.kv")  # asked for each block of a prompt, and so no Path


class PrefixStore:
    def __init__(self, folders: Sequence[Path]) -> None:
        """folders: of each rank."""
        self._folders = folders
        self._good: set[bytes] = set()
        self._checks: dict[bytes, Future[bool]] = {}
        self._threads = ThreadPoolExecutor(min(_NUM_THREADS, os.cpu_count() or 1), "nanovllm store")
        self._kept: set[bytes] = set()  # that this process has written, or found
        self._is_closed = False
        self._ahead = threading.Thread(target=self._check_ahead, name="nanovllm store", daemon=True)
        self._ahead.start()

    def find(self, block_hash: bytes) -> bool:
        return block_hash in self._good and _exists(self._folders[0], block_hash)

    def begin_checks(self, hashes: Iterable[bytes]) -> bool:
        """Check the files of these blocks, which follow each other, up to the first that has none.

        Returns whether any is being checked, these or earlier ones.
        """
        for block_hash in hashes:
            if block_hash not in self._good and block_hash not in self._checks:
                if not _exists(self._folders[0], block_hash):
                    break
                self._checks[block_hash] = self._threads.submit(self._check, block_hash)
        return bool(self._checks)

    def await_checks(self) -> bool:
        """Whether they have ended within the time that a plan may wait. Ask again if not."""
        done, pending = wait(self._checks.values(), _PATIENCE_SECONDS)
        for block_hash, check in list(self._checks.items()):
            if check in done:
                del self._checks[block_hash]
                if check.result():
                    self._good.add(block_hash)
                    self._kept.add(block_hash)
        return not pending

    def _check_ahead(self) -> None:
        """What was used last comes first, so yesterday's prompts are known by the time they are asked for."""
        hashes = newest(self._folders[0])
        for start in range(0, len(hashes), _NUM_AHEAD):
            if self._is_closed:
                return
            some = [block_hash for block_hash in hashes[start : start + _NUM_AHEAD] if block_hash not in self._good]
            with suppress(RuntimeError):  # closed meanwhile
                for block_hash, is_good_one in zip(some, self._threads.map(self._check, some), strict=True):
                    if is_good_one:
                        self._good.add(block_hash)
                        self._kept.add(block_hash)

    def _check(self, block_hash: bytes) -> bool:
        about = {"block": block_hash.hex()}
        return all(is_good(path_of(folder, block_hash), about) for folder in self._folders)

    def use(self, block_hash: bytes) -> None:
        """It will be read now: nobody removes it within the next minute."""
        for folder in self._folders:
            with suppress(OSError):
                os.utime(path_of(folder, block_hash))

    def wants(self, block_hash: bytes) -> bool:
        """Should a block be written that was found again? Asked once for each."""
        if block_hash in self._kept:
            return False
        self._kept.add(block_hash)
        return not _exists(self._folders[0], block_hash)

    def close(self) -> None:
        self._is_closed = True
        self._ahead.join()
        self._threads.shutdown(cancel_futures=True)
