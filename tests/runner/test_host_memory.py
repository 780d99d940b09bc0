"""Memory of the host: the page cache counts as free, and a container's limit as the whole."""

from pathlib import Path

import pytest

from nanovllm.runner.host_memory import HostMemory, host_memory

MEMINFO = "MemTotal:       1000 kB\nMemFree:          10 kB\nMemAvailable:    700 kB\nHugePages_Total:       0\n"
KB = 1024


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def group(folder: str, limit: object, used: int, cache: int, names: tuple[str, str, str]) -> dict[str, str]:
    limit_name, used_name, prefix = names
    return {
        f"{folder}/{limit_name}": f"{limit}\n",
        f"{folder}/{used_name}": f"{used}\n",
        f"{folder}/memory.stat": f"anon 5\n{prefix}active_file {cache // 2}\n{prefix}inactive_file {cache // 2}\n",
    }


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
V2 = ("memory.max", "memory.current", "")


def test_without_limits_it_is_the_machine(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n"})
    assert host_memory(tmp_path) == HostMemory(1000 * KB, 700 * KB)
    write(tmp_path, group("sys/fs/cgroup", "max", 5 * KB, 0, V2))
    assert host_memory(tmp_path) == HostMemory(1000 * KB, 700 * KB)


@pytest.mark.parametrize("path", ["/", "/seen/from/the/host"])
def test_a_container_has_its_limit_less_what_is_no_cache(tmp_path: Path, path: str) -> None:
    write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": f"0::{path}\n"})
    write(tmp_path, group("sys/fs/cgroup", 400 * KB, 300 * KB, 200 * KB, V2))
    assert host_memory(tmp_path) == HostMemory(400 * KB, 300 * KB)


def test_the_least_of_nested_groups_counts(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/user/job\n"})
    write(tmp_path, group("sys/fs/cgroup/user", 600 * KB, 590 * KB, 0, V2))
    write(tmp_path, group("sys/fs/cgroup/user/job", 800 * KB, 100 * KB, 0, V2))
    assert host_memory(tmp_path) == HostMemory(600 * KB, 10 * KB)


def test_groups_of_version_1(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "5:cpu,cpuacct:/\n9:memory:/job\n0::/\n"})
    write(tmp_path, group("sys/fs/cgroup/memory", 2**63 - 4096, 900 * KB, 0, V1))
    assert host_memory(tmp_path) == HostMemory(1000 * KB, 700 * KB)
    write(tmp_path, group("sys/fs/cgroup/memory/job", 500 * KB, 450 * KB, 100 * KB, V1))
    assert host_memory(tmp_path) == HostMemory(500 * KB, 150 * KB)


def test_a_host_without_these_files_has_a_size() -> None:
    memory = host_memory(Path("/nonexistent"))
    assert 0 < memory.available <= memory.total
