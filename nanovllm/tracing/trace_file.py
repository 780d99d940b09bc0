"""TraceFile: events in Chrome's trace format, one a line, in a file that Perfetto (ui.perfetto.dev) opens.

Owns the file and the thread that packs it; what the events mean is `recorder.py`'s. Invariant: whatever ends the
process, the file is readable up to its last flush: the format allows the closing bracket to be missing. A disk that is
full ends the trace and not the engine.
"""

import gzip
import json
import queue
import threading
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

_LINES_AT_ONCE = 512
_LEVEL = 8  # of gzip: 4 microseconds a step more than level 5, in a thread, for a tenth less
_END = '{"ph":"M","pid":0,"name":"end"}\n]\n'  # without a comma before the bracket


class TraceFile:
    """path: ends in .json or .json.gz; what was there is replaced. Raises OSError where it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = _create(path)
        self._lines: list[str] = []
        self._batches: queue.SimpleQueue[tuple[list[str], threading.Event | None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None  # begins with the first batch
        self._is_over = False
        self._file.write(b"[\n")
        self._file.flush()

    def add(self, line: str) -> None:
        """line: an event in JSON."""
        self._lines.append(line)
        if len(self._lines) == _LINES_AT_ONCE:
            self._hand_over(None)

    def flush(self) -> None:
        """Return when all that was added is in the file."""
        if not self._is_over:
            is_written = threading.Event()
            self._hand_over(is_written)
            is_written.wait()

    def close(self) -> None:
        """May be called twice."""
        if not self._is_over:
            self._hand_over(None)
            self._batches.put(None)
            if self._thread is not None:
                self._thread.join()
            if not self._is_over:
                self._file.write(_END.encode())
            self._is_over = True
        with suppress(OSError):  # what a full disk has refused is refused again
            self._file.close()

    def _hand_over(self, is_written: threading.Event | None) -> None:
        lines, self._lines = self._lines, []
        if self._is_over:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="nanovllm trace", daemon=True)
            self._thread.start()
        self._batches.put((lines, is_written))

    def _write(self) -> None:
        """What the thread does. zlib lets other threads run meanwhile."""
        while (batch := self._batches.get()) is not None:
            lines, is_written = batch
            try:
                if not self._is_over:
                    self._file.write("".join(line + ",\n" for line in lines).encode())
                if is_written is not None:
                    self._file.flush()
            except OSError as error:
                self._is_over = True
                warnings.warn(f"the trace {self.path} ends here: {error}", RuntimeWarning, stacklevel=1)
            finally:
                if is_written is not None:
                    is_written.set()


def _create(path: Path) -> Any:
    return gzip.open(path, "wb", _LEVEL) if path.suffix == ".gz" else path.open("wb")


def read_events(path: Path, word: str = "") -> Iterator[dict[str, Any]]:
    """The events of a trace, which may be incomplete; those alone whose line has `word` in it.

    Raises ValueError for a file that is none of these traces.
    """
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        try:
            if file.readline() != "[\n":
                raise ValueError(f"{path} is no trace of this engine's")
            for line in file:
                if word in line and line != "]\n":
                    yield json.loads(line.rstrip(",\n"))
        except (EOFError, json.JSONDecodeError):
            return  # it was being written when its process ended
        except (gzip.BadGzipFile, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no trace of this engine's: {error}") from error
