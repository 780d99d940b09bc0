"""What is printed at the end: a table for people, one JSON line for programs.

Owns the facts about machine, versions and commit. Invariant: every figure in the JSON line can be traced to single
runs.
"""

import json
import os
import platform
import shlex
import subprocess
from argparse import Namespace
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nanovllm import __version__


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


def print_record(args: Namespace, record: Mapping[str, Any]) -> None:
    """One JSON line on standard output, and behind `--output`. record: settings, and results with every run."""
    line = json.dumps(
        {
            "benchmark": args.kind,
            "model": args.model,
            "command": shlex.join(["nanovllm", *args.argv]),
            **record,
            "hardware": _hardware(),
            "versions": _versions(),
            "commit": _commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        ensure_ascii=False,
    )
    print(line)
    if args.output is not None:
        with Path(args.output).open("a", encoding="utf-8") as file:
            print(line, file=file)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return str(value)


def _versions() -> dict[str, str | None]:
    installed: dict[str, str | None] = {
        "nanovllm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("triton", "transformers"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = None
    return installed


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
