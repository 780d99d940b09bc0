"""The journal of a batch job: a file beside OUT with a line for each finished row, so that no row is computed twice.

Owns what survives a kill, a full disk and a second start. A row is known by its number and a key, a hash of its
content; what all rows depend on (model, weights, parameters) is the first line, and must be the same at every start.
Invariant: up to its last newline the file is whole, and each line of it is a result that stands. What is behind that
newline was being written when the process ended, and is dropped.
"""

import fcntl
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from nanovllm.batch.tables import Row
from nanovllm.errors import brief

_ABSENT = -1


def row_key(row: Row) -> int:
    """64 bits of the row's content."""
    return int.from_bytes(blake2b(row.content, digest_size=8).digest(), "little")


class Journal:
    """At most one process has a journal open. num_rows: so many are done; 16 bytes of memory for each."""

    def __init__(self, path: Path, about: Mapping[str, Any], restart: bool = False) -> None:
        """about: what the results depend on. Raises ValueError if the journal was begun about something else.

        restart: forget what is there.
        """
        self.path = path
        self.done_digest: str | None = None  # of the rows, once OUT is written
        self.num_rows = 0
        self._offsets, self._keys = array("q"), array("Q")  # by number
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._size = 0 if restart else self._read(about)
            os.ftruncate(self._file, self._size)
            if self._size == 0:
                self._write(_line({"nanovllm batch": about}))
        except BlockingIOError:
            os.close(self._file)
            raise ValueError(f"another process is writing {path}; wait for its end, or choose another OUT") from None
        except BaseException:
            os.close(self._file)
            raise

    def has(self, row: Row) -> bool:
        """Is this row done? Raises ValueError if another one was, of the same number."""
        if row.number >= len(self._offsets) or self._offsets[row.number] == _ABSENT:
            return False
        if self._keys[row.number] != row_key(row):
            raise ValueError(
                f"row {row.number} (from 0) is not the one that was computed: the input has changed since "
                f"{self.path} was begun. Give the old input again, or --restart to compute all of the new one"
            )
        return True

    def append(self, row: Row, result: Mapping[str, Any]) -> None:
        """Once this returns, the result outlives the process."""
        key, offset = row_key(row), self._size
        self._write(_line({"row": row.number, "key": f"{key:016x}", "result": result}))
        self._keep(row.number, key, offset)

    def results(self, rows: Iterable[Row]) -> Iterator[tuple[Row, dict[str, Any]]]:
        """Each row with its result. Raises ValueError if these are not exactly the rows that are done."""
        num_rows = 0
        with self.path.open("rb") as file:
            for row in rows:
                if not self.has(row):
                    raise ValueError(f"row {row.number} (from 0) is new in the input: run the command again for it")
                file.seek(self._offsets[row.number])
                yield row, json.loads(file.readline())["result"]
                num_rows += 1
        if num_rows != self.num_rows:
            raise ValueError(
                f"the input has {num_rows:,} rows and {self.num_rows:,} were computed: it has changed since "
                f"{self.path} was begun. Give the old input again, or --restart to compute all of the new one"
            )

    def conclude(self, digest: str, about: Mapping[str, Any]) -> None:
        """OUT is written: from here on only that is known. digest: of all rows' keys."""
        new = self.path.with_name(self.path.name + ".new")
        new.write_bytes(_line({"nanovllm batch": about}) + _line({"done": digest}))
        new.replace(self.path)

    def close(self) -> None:
        os.close(self._file)

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.pwrite(self._file, rest, self._size + len(line) - len(rest)) :]
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise OSError(
                f"{self.path} cannot be written ({error.strerror}). The {self.num_rows:,} rows that were done are "
                "kept: make room, and run the same command again to go on"
            ) from error
        self._size += len(line)

    def _keep(self, number: int, key: int, offset: int) -> None:
        missing = number + 1 - len(self._offsets)
        if missing > 0:
            self._offsets.extend([_ABSENT] * missing)
            self._keys.extend([0] * missing)
        self._offsets[number], self._keys[number] = offset, key
        self.num_rows += 1

    def _read(self, about: Mapping[str, Any]) -> int:
        """Take in what is there; returns the size of what is whole."""
        size = 0
        with os.fdopen(os.dup(self._file), "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    if number == 1:
                        self._check(entry["nanovllm batch"], about)
                    elif "done" in entry:
                        self.done_digest = entry["done"]
                    else:
                        self._keep(entry["row"], int(entry["key"], 16), size)
                except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
                    raise ValueError(
                        f"line {number} of {self.path} is damaged ({error!r}); --restart computes all rows again"
                    ) from error
                size += len(line)
        return size

    def _check(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for name in [*before, *now]:
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"{self.path} was begun with another {name}: {brief(before.get(name))} then, "
                    f"{brief(now.get(name))} now. Run the command as before to go on, or with --restart to begin anew"
                )


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"
