"""GRPO with TRL itself, as examples/grpo.py runs it: the reward rises, and a second run draws the same tokens."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.integrations, pytest.mark.demo_model]
EXAMPLE = Path(__file__).parents[2] / "examples" / "grpo.py"


def run(out: Path, num_steps: int) -> dict[str, Any]:
    command = [sys.executable, str(EXAMPLE), "--steps", str(num_steps), "--out", str(out)]
    subprocess.run(command, check=True, timeout=3600)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def test_grpo_learns_and_repeats_itself(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    first, second = (run(tmp_path / f"{i}.json", 24) for i in range(2))
    assert sum(first["rewards"][-6:]) / 6 > sum(first["rewards"][:6]) / 6 + 0.05
    assert first["version"] > 10, "an update for each step"
    assert second["tokens"] == first["tokens"]
