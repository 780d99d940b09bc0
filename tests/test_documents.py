"""What the documents quote exists as written."""

import re
import shlex
from pathlib import Path

import pytest

from nanovllm.cli.arguments import build_parser

ROOT = Path(__file__).parents[1]
COMMANDS = [
    line
    for name in ("README.md", "benchmarks/README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")))
    for line in (ROOT / name).read_text().replace("\\\n", " ").splitlines()
    if line.startswith("nanovllm ")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_can_be_typed(line: str) -> None:
    """A command ends at its comment: behind a # or, in a list of commands, behind a wide gap."""
    line = re.sub(r"\s+(?=--)", " ", line)
    command = re.split(r"\s#|\s{2,}(?!-)", line)[0]
    assert build_parser().parse_args(shlex.split(command)[1:]).command


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 15
