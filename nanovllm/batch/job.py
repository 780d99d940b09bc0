"""A batch job: the rows of a table through the engine, many at a time, and OUT at the end.

Owns how many rows are in flight, and the order of events that makes a job safe to kill: a result is in the journal
before its row counts as done; OUT is written from the journal beside its place and renamed; only then is the journal
cut. Invariant: OUT is absent or whole, and the same however often the job was interrupted.
"""

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from nanovllm.batch.journal import Journal, row_key
from nanovllm.batch.tables import Row, Table


class Job(Protocol):
    """What rows mean. answer: raises only what ends the whole job."""

    async def answer(self, row: Row) -> dict[str, Any]: ...

    def merge(self, row: Row, result: Mapping[str, Any]) -> dict[str, Any]: ...


Report = Callable[[Mapping[str, Any]], None]
Write = Callable[[Path, Iterator[dict[str, Any]]], None]


async def run_rows(table: Table, job: Job, journal: Journal, window: int, report: Report) -> None:
    """Compute the rows that are not in the journal, `window` of them at a time. report: told each new result."""
    places = asyncio.Semaphore(window)

    async def compute(row: Row) -> None:
        try:
            result = await job.answer(row)
            journal.append(row, result)
            report(result)
        finally:
            places.release()

    try:
        async with asyncio.TaskGroup() as tasks:
            for row in table.rows():
                if not journal.has(row):
                    await places.acquire()
                    tasks.create_task(compute(row))
    except BaseExceptionGroup as group:  # the first is the cause, the others are cancelled
        raise group.exceptions[0] from None


def write_out(path: Path, table: Table, job: Job, journal: Journal, write: Write, about: Mapping[str, Any]) -> None:
    """OUT from input and journal, in the input's order."""
    digest = blake2b(digest_size=16)

    def keyed() -> Iterator[Row]:
        for row in table.rows():
            digest.update(row_key(row).to_bytes(8, "little"))
            yield row

    new = path.with_name(path.name + ".new")
    try:
        write(new, (job.merge(row, result) for row, result in journal.results(keyed())))
    except BaseException as error:
        new.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OSError(
            f"{path} cannot be written ({error.strerror}). All {journal.num_rows:,} rows are done and kept in "
            f"{journal.path}: make room, and run the same command again"
        ) from error
    new.replace(path)
    _sync_folder(path.parent)
    journal.conclude(digest.hexdigest(), about)


def input_digest(table: Table) -> str:
    """As `Journal.done_digest`, of the input as it is now."""
    digest = blake2b(digest_size=16)
    for row in table.rows():
        digest.update(row_key(row).to_bytes(8, "little"))
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
