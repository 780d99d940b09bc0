"""Tables on disk: JSON lines, CSV and Parquet, read one row at a time and written whole.

Owns formats and nothing of what the columns mean. Invariant: a table read twice gives the same rows with the same
contents, and memory never holds more than a few thousand of them. A row that cannot be read is a row with a problem, so
the ones behind it keep their numbers.
"""

import csv
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from nanovllm.errors import brief

_ROWS_AT_ONCE = 4096  # of Parquet
_MARK = b"\xef\xbb\xbf"  # what some editors put before UTF-8


@dataclass(frozen=True)
class Row:
    """number: from 0. content: bytes that are equal exactly if the row is. problem: why it has no fields."""

    number: int
    content: bytes
    fields: Mapping[str, Any]
    problem: str | None = None


class Table(Protocol):
    path: Path

    def rows(self) -> Iterator[Row]: ...

    def count(self) -> int: ...

    def write(self, path: Path, rows: Iterable[dict[str, Any]], new_columns: Mapping[str, type]) -> None:
        """Rows of this table with columns more, in the same format."""


def open_table(path: Path) -> Table:
    """Raises ValueError for a name of no known format, OSError for a file that cannot be read."""
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{str(path)!r} has none of the endings of a table: {', '.join(_FORMATS)}")
    with path.open("rb"):  # here, where the message is about the file
        return kind(path)


def check_output(table: Table, path: Path) -> None:
    """Raises ValueError for an OUT that this table cannot be written as."""
    if path.suffix.lower() != table.path.suffix.lower() and not is_json_lines(path):
        raise ValueError(
            f"the results of a {table.path.suffix} file are written as {table.path.suffix} or .jsonl, not as "
            f"{str(path)!r}"
        )


def is_json_lines(path: Path) -> bool:
    return _FORMATS.get(path.suffix.lower()) is JSONLines


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with _new_file(path) as file:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False, default=str)
            if not line.isascii() and _has_surrogate(line):  # JSON has them, UTF-8 does not
                line = json.dumps(row, default=str)
            file.write(line + "\n")


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


class JSONLines:
    """An object on each line; empty lines are passed over."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> Iterator[Row]:
        for number, (line, content) in enumerate(self._lines()):
            try:
                fields = json.loads(content, parse_constant=_refuse_constant)
            except (ValueError, RecursionError) as error:
                yield Row(number, content, {}, f"line {line} is no JSON: {error}")
                continue
            problem = None if isinstance(fields, dict) else f"line {line} is no JSON object: {brief(fields)}"
            yield Row(number, content, fields if problem is None else {}, problem)

    def count(self) -> int:
        return sum(1 for _ in self._lines())

    def write(self, path: Path, rows: Iterable[dict[str, Any]], new_columns: Mapping[str, type]) -> None:
        write_json_lines(path, rows)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                content = (line.removeprefix(_MARK) if number == 1 else line).strip()
                if content:
                    yield number, content


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


class CSV:
    """Comma-separated with a header, in UTF-8."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> Iterator[Row]:
        with self._reader() as reader:
            columns = _header(reader, self.path)
            for number, cells in enumerate(filter(None, reader)):
                content = json.dumps(cells).encode()
                if len(cells) == len(columns):
                    yield Row(number, content, dict(zip(columns, cells, strict=True)))
                else:
                    problem = f"line {reader.line_num} has {len(cells)} cells, the header {len(columns)}"
                    yield Row(number, content, {}, problem)

    def count(self) -> int:
        with self._reader() as reader:
            return sum(1 for cells in reader if cells) - 1

    def write(self, path: Path, rows: Iterable[dict[str, Any]], new_columns: Mapping[str, type]) -> None:
        with self._reader() as reader:
            columns = _header(reader, self.path)
        with _new_file(path) as file:
            writer = csv.DictWriter(file, [*columns, *new_columns], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    @contextmanager
    def _reader(self) -> Iterator[Any]:
        csv.field_size_limit(sys.maxsize)  # else no prompt may be longer than 131,072 characters
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            try:
                yield csv.reader(file, strict=True)
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{self.path} is no CSV in UTF-8: {error}") from error


def _header(reader: Iterator[list[str]], path: Path) -> list[str]:
    columns = next(reader, [])
    if len(set(columns)) < len(columns) or not columns:
        raise ValueError(f"the first line of {path} must name the columns, each once; got {brief(columns)}")
    return columns


class Parquet:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError(
                f"Parquet files need the extra `batch`: pip install 'nanovllm[batch]' ({error})"
            ) from error
        self._arrow, self._parquet = pyarrow, pyarrow.parquet
        with self._reading() as file:
            self._schema = file.schema_arrow

    def rows(self) -> Iterator[Row]:
        number = 0
        with self._reading() as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                for fields in batch.to_pylist():
                    yield Row(number, repr(fields).encode(errors="surrogatepass"), fields)
                    number += 1

    def count(self) -> int:
        with self._reading() as file:
            return int(file.metadata.num_rows)

    def write(self, path: Path, rows: Iterable[dict[str, Any]], new_columns: Mapping[str, type]) -> None:
        types = {str: self._arrow.string(), int: self._arrow.int64()}
        schema = self._schema
        for name, kind in new_columns.items():
            schema = schema.append(self._arrow.field(name, types[kind]))
        with self._parquet.ParquetWriter(path, schema) as writer:
            for part in _parts(rows):
                writer.write_table(self._arrow.Table.from_pylist(part, schema=schema))

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        try:
            with self._parquet.ParquetFile(self.path) as file:
                yield file
        except self._arrow.ArrowInvalid as error:
            raise ValueError(f"{self.path} is no Parquet file that can be read: {error}") from error


def _parts(rows: Iterable[dict[str, Any]]) -> Iterator[Sequence[dict[str, Any]]]:
    part: list[dict[str, Any]] = []
    for row in rows:
        part.append(row)
        if len(part) == _ROWS_AT_ONCE:
            yield part
            part = []
    yield part


@contextmanager
def _new_file(path: Path) -> Iterator[IO[str]]:
    """A text file whose content is on the disk when the block ends."""
    with path.open("w", encoding="utf-8", newline="") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


_FORMATS: Mapping[str, Callable[[Path], Table]] = {
    ".jsonl": JSONLines,
    ".ndjson": JSONLines,
    ".csv": CSV,
    ".parquet": Parquet,
}
