import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nanovllm.batch.journal import Journal
from nanovllm.batch.tables import Row

ABOUT = {"model": "m", "engine options": {"dtype": "float32"}}
ROWS = [Row(number, f"row {number}".encode(), {}) for number in range(4)]


def results(path: Path, rows: Sequence[Row]) -> list[Any]:
    journal = Journal(path, ABOUT)
    try:
        return [result for _, result in journal.results(rows)]
    finally:
        journal.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a journal with rows 2, 0 and 1, in that order."""
    path = tmp_path / "out.jsonl.journal"
    journal = Journal(path, ABOUT)
    for number in (2, 0, 1):
        journal.append(ROWS[number], {"text": f"answer {number}\u00fc\n"})
    journal.close()
    return path


def test_results_come_back_in_the_order_of_rows(path: Path) -> None:
    assert results(path, ROWS[:3]) == [{"text": f"answer {number}\u00fc\n"} for number in range(3)]


def test_cut_at_any_byte_it_keeps_what_is_whole_and_goes_on(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    torn = tmp_path / "torn"
    for size in range(len(whole) + 1):
        torn.write_bytes(whole[:size])
        journal = Journal(torn, ABOUT)
        num_lines = sum(end <= size for end in ends)
        assert journal.num_rows == max(num_lines - 1, 0)
        assert journal.has(ROWS[2]) == (num_lines > 1)
        for number in (2, 0, 1):
            if not journal.has(ROWS[number]):
                journal.append(ROWS[number], {"text": f"answer {number}\u00fc\n"})
        journal.close()
        assert torn.read_bytes() == whole


def test_another_row_of_the_same_number_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 1 .* input has changed .* --restart"):
        results(path, [ROWS[0], Row(1, b"edited", {}), ROWS[2]])


def test_fewer_or_more_rows_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="the input has 2 rows and 3 were computed"):
        results(path, ROWS[:2])
    with pytest.raises(ValueError, match=r"row 3 .* is new"):
        results(path, ROWS)


def test_what_results_depend_on_must_be_the_same(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"another model: 'm' then, 'other' now.*--restart"):
        Journal(path, {**ABOUT, "model": "other"})
    assert path.read_bytes() == before, "and nothing is lost by asking"
    journal = Journal(path, {**ABOUT, "model": "other"}, restart=True)
    assert journal.num_rows == 0
    journal.close()


def test_a_damaged_line_is_named(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{]\n" + lines[2])
    with pytest.raises(ValueError, match=r"line 2 of .* is damaged"):
        Journal(path, ABOUT)


def test_two_processes_do_not_write_one_journal(path: Path) -> None:
    journal = Journal(path, ABOUT)
    with pytest.raises(ValueError, match="another process"):
        Journal(path, ABOUT)
    journal.close()


def test_a_full_disk_loses_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    journal = Journal(path, ABOUT)
    write = os.pwrite

    def write_ten_bytes(file: int, data: bytes, offset: int) -> int:
        if offset > len(before):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[:10], offset)

    monkeypatch.setattr(os, "pwrite", write_ten_bytes)
    with pytest.raises(OSError, match=r"No space left.* 3 rows that were done are kept.* same command"):
        journal.append(ROWS[3], {"text": "lost"})
    monkeypatch.undo()
    assert path.read_bytes() == before
    journal.append(ROWS[3], {"text": "kept"})
    journal.close()
    assert results(path, ROWS)[3] == {"text": "kept"}
