"""What is printed at the end: a table for people, one JSON line for programs.

Owns the facts about machine, versions and commit. Invariant: every figure in the JSON line can be traced to single
runs.
"""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def print_table(rows: Sequence[dict[str, Any]], columns: Mapping[str, str]) -> None:
    """columns: title -> key in a row. Numbers stand to the right, text to the left."""
    table = [list(columns), *([_cell(row.get(key)) for key in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    is_text = [all(isinstance(row.get(key), str) for row in rows) for key in columns.values()]
    for number, line in enumerate(table):
        cells = (c.ljust(w) if text else c.rjust(w) for c, w, text in zip(line, widths, is_text, strict=True))
        print("  ".join(cells).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def print_json(benchmark: str, model: str, settings: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """The one line. settings: what was asked for; results: one entry an engine and workload, with every run."""
    record = {
        "benchmark": benchmark,
        "model": model,
        "settings": settings,
        "results": list(results),
        "hardware": _hardware(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    print(json.dumps(record, ensure_ascii=False))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return str(value)


def _hardware() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        facts["cuda"] = torch.version.cuda
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree this runs from, with "+" if files differ from it; None for an installed package."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "")
