"""How much memory this process can have on a host: the machine's, or the least that its cgroups (containers) allow.

Owns reading /proc and /sys. Invariant: the page cache counts as available, since the kernel gives it up when asked.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class HostMemory(NamedTuple):
    """Bytes: what there is in all, and what could be taken now."""

    total: int
    available: int


def host_memory(root: Path = Path("/")) -> HostMemory:
    """root: where /proc and /sys are."""
    memory = _machine_memory(root)
    for limit, used in _cgroup_limits(root):
        memory = HostMemory(min(memory.total, limit), min(memory.available, max(limit - used, 0)))
    return memory


def _machine_memory(root: Path) -> HostMemory:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:  # no Linux
        page_size = os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * page_size
        return HostMemory(total, total)
    info = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
    return HostMemory(info["MemTotal"], info.get("MemAvailable", info["MemFree"]))


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that are no page cache) of each cgroup that this process is in and that has a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        # Inside a container the path may be the host's, of which only the top is visible here.
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            try:
                limit, used = (int((group / name).read_text()) for name in names[:2])
                stat = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
                cache = sum(int(stat.get(f"{names[2]}{kind}_file", 0)) for kind in ("active", "inactive"))
                yield limit, used - cache
            except (OSError, ValueError):  # not there, or "max"
                pass
            if group == top:
                break
