"""Engines that are measured in a process of their own: nano-vllm, and an earlier build of this project.

Owns what is said to such a process: options in, then jobs in and their seconds and token counts out, a JSON line each.
Invariant: a process has no model on the device before its turn comes.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanovllm_bench.workload import Workload, check_counts


class _Elsewhere:
    """A process that answers each line with a line that begins with "{"; whatever else it prints is not for us."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, line: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and `read` says how
            print(json.dumps(line), file=self._process.stdin, flush=True)
        return self.read()

    def read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError(f"{self._name} ended with status {self._process.wait()}; its own message is above")

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended before it read all
            self._process.stdin.close()  # it ends
        self._process.wait()
        self._process.stdout.close()


class OriginalNanoVLLM:
    """nano-vllm, through `nano_vllm_worker.py`; `model` must be a folder that it can load."""

    name = "nano-vllm"

    def __init__(self, model: str, options: dict[str, Any], python: str) -> None:
        shared = {name: options[name] for name in ("max_model_len", "max_num_seqs", "enforce_eager") if name in options}
        worker = Path(__file__).with_name("nano_vllm_worker.py")
        self._process = _Elsewhere(self.name, [python, str(worker), model, json.dumps(shared)])
        self.version = self._process.read()["version"]

    def run(self, workload: Workload) -> float:
        runs = [(workload.prompts, workload.max_tokens)]
        if workload.prefix:
            runs.insert(0, ([workload.prefix], [1]))
        for prompts, max_tokens in runs:
            # Greedy decoding is not offered there: temperature 1 costs it the same.
            temperature = workload.temperature or 1.0
            answer = self._process.ask({"prompts": prompts, "max_tokens": max_tokens, "temperature": temperature})
        check_counts(self.name, workload, answer["counts"])
        return float(answer["seconds"])

    def close(self) -> None:
        self._process.close()


class EarlierBuild:
    """Another checkout of this project, through `earlier_build_worker.py`.

    It is made while another engine is measured still, and its process imports what it needs: `load` is for its turn.
    """

    name = "before"

    def __init__(self, checkout: Path) -> None:
        """checkout: as `check_checkout` wants it."""
        worker = Path(__file__).with_name("earlier_build_worker.py")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout.resolve()), *_python_path()])}
        self._process = _Elsewhere(self.name, [sys.executable, "-P", str(worker)], environment)
        self.version = _commit_of(checkout)

    def load(self, model: str, options: dict[str, Any], needs_tokenizer: bool) -> None:
        answer = self._process.ask({"model": model, "skip_tokenizer_init": not needs_tokenizer, **options})
        self.version = self.version or str(answer["version"])

    def run(self, workload: Workload) -> float:
        answer = self._process.ask(asdict(workload))
        check_counts(self.name, workload, answer["counts"])
        return float(answer["seconds"])

    def close(self) -> None:
        self._process.close()


def check_checkout(checkout: Path) -> None:
    """Raises ValueError for a folder that holds no build of this project."""
    if not (checkout / "nanovllm" / "llm.py").is_file():
        raise ValueError(f"--before {checkout} is no checkout of this repository: name the folder that has nanovllm/")


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _commit_of(checkout: Path) -> str:
    """ "" for a copy without its history."""
    git = ["git", "-C", str(checkout), "rev-parse", "--show-toplevel", "--short=12", "HEAD"]
    try:
        top, commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit if Path(top).samefile(checkout) else ""  # not that of a repository around the copy
