"""The path from prompt to token: docs/reading.md lists its files, and CONTRIBUTING.md says how long it may be.

A file is on the path if one CPU `generate` of two prompts calls a function of it. Kernels are not counted: what an
operation means is read beside it. A line counts if it holds code: no blank lines, comments or docstrings.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, save_random, save_tokenizer

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nanovllm"
NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)
SLACK = 100  # lines that may be saved before the budget has to follow


def listed_files() -> list[str]:
    (block,) = re.findall(r"## The path\n.*?```\n(.*?)```", (ROOT / "docs" / "reading.md").read_text(), re.DOTALL)
    return [name for line in block.splitlines() for name in line.split()]


def num_code_lines(source: str) -> int:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines.difference_update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return len(lines)


def test_lines_of_code_are_neither_blank_nor_comments_nor_docstrings() -> None:
    begin = '"""One.\n\nTwo."""\n\n# no\nx = """a\n\nb"""  # three\n\n'
    source = begin + 'def f(\n    y: int,\n):\n    """No."""\n    return y\n'
    assert num_code_lines(source) == 3 + 4


def test_the_path_is_as_short_as_contributing_says() -> None:
    (stated,) = re.findall(r"\*\*([\d,]+) lines of code\*\*", (ROOT / "CONTRIBUTING.md").read_text())
    budget = int(stated.replace(",", ""))
    lengths = {name: num_code_lines((PACKAGE / name).read_text()) for name in listed_files()}
    total = sum(lengths.values())
    assert total <= budget, f"the path has {total:,} lines of code, {budget:,} are allowed: {lengths}"
    assert total > budget - SLACK, f"the path has only {total:,} lines of code: write that into CONTRIBUTING.md"


def test_the_listed_files_are_those_that_a_generate_enters(tmp_path: Path) -> None:
    folder = save_random(tmp_path, vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS)
    save_tokenizer(folder)
    command = [sys.executable, "-m", "tests.trace_generate", str(folder)]
    traced = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout
    entered = {name for name in traced.split() if not name.startswith("kernels/")}
    listed = set(listed_files())
    assert not entered - listed, "these files are on the path now: keep them off it, or list them in docs/reading.md"
    assert not listed - entered, "these files are not on the path any more: take them off the list"
