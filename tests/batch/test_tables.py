import json
from pathlib import Path
from typing import Any

import pytest

from nanovllm.batch.tables import check_output, open_table

FIELDS = [
    {"id": "a", "prompt": 'Say "hi",\nthen leave'},
    {"id": "b", "prompt": "Gr\u00fc\u00dfe \U0001f600"},
    {"id": "c", "prompt": "x" * 200_000},
]
NEW = {"text": str, "count": int}


def write_table(path: Path, rows: list[dict[str, Any]] = FIELDS) -> Path:
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow")
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows_come_back_with_new_columns(suffix: str, tmp_path: Path) -> None:
    table = open_table(write_table(tmp_path / f"in{suffix}"))
    rows = list(table.rows())
    assert [row.fields for row in rows] == FIELDS
    assert [row.number for row in rows] == [0, 1, 2]
    assert table.count() == 3
    assert len({row.content for row in rows}) == 3
    out = tmp_path / f"out{suffix}"
    table.write(out, ({**row.fields, "text": "t", "count": row.number} for row in rows), NEW)
    kind = str if suffix == ".csv" else int
    expected = [{**fields, "text": "t", "count": kind(number)} for number, fields in enumerate(FIELDS)]
    assert [row.fields for row in open_table(out).rows()] == expected


def test_lines_that_are_no_objects_are_rows_with_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"prompt": "a"}\n\n{"prompt": \n[1]\n{"prompt": NaN}\n{"prompt": "\xff"}\n{"prompt": "b"}'
    )
    rows = list(open_table(path).rows())
    assert [row.problem is None for row in rows] == [True, False, False, False, False, True]
    assert [row.number for row in rows] == list(range(6))
    assert "line 3 is no JSON" in str(rows[1].problem)
    assert "line 4 is no JSON object" in str(rows[2].problem)


def test_a_lone_surrogate_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "\\ud800 \u00fc"}\n', encoding="utf-8")
    table = open_table(path)
    table.write(tmp_path / "out.jsonl", (dict(row.fields) for row in table.rows()), {})
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"prompt": "\ud800 \u00fc"}


def test_a_csv_row_with_too_few_cells_has_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("id,prompt\n1,a\n2\n3,c\n")
    rows = list(open_table(path).rows())
    assert [row.problem for row in rows] == [None, "line 3 has 1 cells, the header 2", None]


@pytest.mark.parametrize("header", ["", "a,a\n1,2\n"])
def test_a_csv_needs_a_header(header: str, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(header)
    with pytest.raises(ValueError, match="must name the columns"):
        list(open_table(tmp_path / "in.csv").rows())


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"in\.txt' has none of the endings"):
        open_table(tmp_path / "in.txt")
    with pytest.raises(FileNotFoundError):
        open_table(tmp_path / "in.jsonl")
    (tmp_path / "in.csv").write_bytes(b"prompt\n\xff\n")
    with pytest.raises(ValueError, match="no CSV in UTF-8"):
        list(open_table(tmp_path / "in.csv").rows())
    pytest.importorskip("pyarrow")
    (tmp_path / "in.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="no Parquet file"):
        open_table(tmp_path / "in.parquet")


def test_results_keep_the_format_or_are_json_lines(tmp_path: Path) -> None:
    table = open_table(write_table(tmp_path / "in.csv"))
    check_output(table, Path("out.csv"))
    check_output(table, Path("out.jsonl"))
    with pytest.raises(ValueError, match=r"written as \.csv or \.jsonl"):
        check_output(table, Path("out.parquet"))
