#!/usr/bin/env python3
"""Mutation run: how many single wrong changes to the planner do its tests notice?

    python scripts/mutate.py                                     # all changes to the default files: some minutes
    python scripts/mutate.py --sample 60                         # some of them, the same ones each time
    python scripts/mutate.py nanovllm/engine/block_pool.py       # all changes to this file
    python scripts/mutate.py --lines 120-140 nanovllm/engine/scheduler.py

Makes one change at a time in a temporary copy (a comparison, an operator, a constant, a condition, a statement gone)
and runs tests there until one fails: first those of single rules, then 300 random workloads against the oracle.
A change that makes a test hang counts as noticed, and is listed, for a test should have a bound of its own. Prints what
nobody noticed and the score. Some changes alter nothing that anyone could notice, so 100 % is out of reach.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILES = ("block_pool", "cache_manager", "grouped_cache", "request", "scheduler", "steady_decode")
ORACLE = "tests/engine/test_scheduler_oracle.py"
RULES = ("block_pool", "ends", "grouped_cache", "planner_rules", "scheduler", "shared_prefixes", "steady_decode")
STAGES = {
    "rules": [f"tests/engine/test_{name}.py" for name in RULES],
    "oracle": [f"{ORACLE}::test_random_workloads_equal_the_oracle[0]"],
}

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
}  # fmt: skip
NAMES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "reversed": "list",
    "appendleft": "append", "popleft": "pop",
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    path: str  # from the root
    line: int
    old: str
    new: str
    source: str  # the whole file


# A change of one node: (the node as it is, the node as it would be; None takes a statement away).
Change = tuple[Any, ast.AST | None]


def changes_of(node: ast.AST) -> Iterator[Change]:
    """Every change of this node itself, its children left as they are."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in COMPARISONS:
            yield node, _with(node, ops=[COMPARISONS[type(op)]()])
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            yield node, _with(node, op=OPERATORS[type(op)]())
        case ast.AugAssign(op=op):
            if type(op) in OPERATORS:
                yield node, _with(node, op=OPERATORS[type(op)]())
            yield node, None
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node, node.operand
        case ast.BoolOp(values=values):
            for i in range(len(values)):
                rest = values[:i] + values[i + 1 :]
                yield node, rest[0] if len(rest) == 1 else _with(node, values=rest)
        case ast.Constant(value=bool(value)):
            yield node, ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield node, ast.Constant(value + 1)
        case ast.If() | ast.IfExp():
            for value in (True, False):
                yield node, _with(node, test=ast.Constant(value))
        case ast.Call(func=ast.Name(id=name)) if name in NAMES:
            yield node, _with(node, func=ast.Name(NAMES[name]))
        case ast.Call(func=ast.Attribute(attr=name)) if name in NAMES:
            yield node, _with(node, func=_with(node.func, attr=NAMES[name]))
        case ast.Expr(value=ast.Call()) | ast.Continue() | ast.Break() | ast.Return(value=None):
            yield node, None
        case ast.Assign(targets=[target]) if not isinstance(target, ast.Name):
            yield node, None


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def children(node: ast.AST) -> Iterator[ast.AST]:
    """What can run: no annotations, decorators, assertions or error messages."""
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns", "decorator_list"):
            nodes = value if isinstance(value, list) else [value]
            yield from (n for n in nodes if isinstance(n, ast.AST) and not isinstance(n, (ast.Assert, ast.Raise)))


def mutants_of(path: str) -> list[Mutant]:
    tree = ast.parse((ROOT / path).read_text())
    found = []
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        nodes.extend(children(node))
        for old, new in changes_of(node):
            source = ast.unparse(ast.fix_missing_locations(replaced(tree, old, new or ast.Pass())))
            found.append(Mutant(path, old.lineno, _text(old), _text(new) if new else "(gone)", source))
    return sorted(found, key=lambda mutant: mutant.line)


def replaced(node: ast.AST, old: ast.AST, new: ast.AST) -> ast.AST:
    """A copy of the tree in which one node is another."""
    if node is old:
        return new

    def inside(value: object) -> object:
        if isinstance(value, list):
            return [inside(item) for item in value]
        return replaced(value, old, new) if isinstance(value, ast.AST) else value

    return _with(node, **{name: inside(value) for name, value in ast.iter_fields(node)})


def _text(node: ast.AST) -> str:
    return ast.unparse(node).split("\n")[0]


def fate(mutant: Mutant, copies: "SimpleQueue[Path]", seconds: float) -> str:
    """Which stage noticed it, "hang", or "" if none did."""
    folder = copies.get()
    try:
        original = (folder / mutant.path).read_text()
        (folder / mutant.path).write_text(mutant.source)
        try:
            return run_stages(folder, seconds)
        finally:
            (folder / mutant.path).write_text(original)
    finally:
        copies.put(folder)


def run_stages(folder: Path, seconds: float) -> str:
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:randomly"]
    for stage, tests in STAGES.items():
        # -B: a file that changes twice a second could be taken for its compiled self
        command = [sys.executable, "-B", "-m", "pytest", *options, *tests]
        try:
            code = subprocess.run(command, cwd=folder, capture_output=True, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            return "hang"
        if code:
            return stage
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=[f"nanovllm/engine/{name}.py" for name in FILES])
    parser.add_argument("--sample", type=int, metavar="N", help="only N of the changes, chosen by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", metavar="A-B", help="only changes of these lines of the files")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--timeout", type=float, default=60, metavar="SECONDS", help="for each stage of the tests")
    options = parser.parse_args()
    mutants = [mutant for path in options.files for mutant in mutants_of(path)]
    if options.lines:
        first, last = map(int, options.lines.split("-"))
        mutants = [mutant for mutant in mutants if first <= mutant.line <= last]
    if options.sample is not None and options.sample < len(mutants):
        mutants = random.Random(options.seed).sample(mutants, options.sample)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as threads:
        copies: SimpleQueue[Path] = SimpleQueue()
        for job in range(options.jobs):
            folder = Path(scratch) / str(job)
            for name in ("nanovllm", "tests"):
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(ROOT / "pyproject.toml", folder)
            copies.put(folder)
        if run_stages(Path(scratch) / "0", options.timeout):
            print("the tests fail without any change; mend them first", file=sys.stderr)
            return 1
        fates: list[str] = []
        fates_in_order = threads.map(lambda mutant: fate(mutant, copies, options.timeout), mutants)
        for mutant, noticed in zip(mutants, fates_in_order, strict=True):
            fates.append(noticed)
            if noticed in ("", "hang"):
                print(
                    f"{noticed or 'SURVIVED'}  {mutant.path}:{mutant.line}: {mutant.old}  ->  {mutant.new}", flush=True
                )
    count = Counter(fates)
    num_noticed = len(fates) - count[""]
    print(f"{num_noticed} of {len(fates)} changes noticed ({num_noticed / max(len(fates), 1):.0%}):", end=" ")
    print(f"{count['rules']} by tests of rules, {count['oracle']} by the oracle alone, {count['hang']} by hanging")
    return 0


if __name__ == "__main__":
    sys.exit(main())
