"""`nanovllm bench`: the benchmarks, a package beside this one that comes with the source and not with the wheel.

Owns finding it. Invariant: nothing else knows whether it is there.
"""

import argparse
from argparse import Namespace
from importlib import import_module
from importlib.util import find_spec

from nanovllm.cli.parsers import Commands, add_command

_PACKAGE = "nanovllm_bench"
_REMEDY = "The benchmarks come with the source: run in a checkout of it, or after `pip install -e CHECKOUT`."


def add_bench(commands: Commands) -> None:
    if find_spec(_PACKAGE) is not None:
        import_module(f"{_PACKAGE}.arguments").add_bench(commands)
        return
    parser = add_command(commands, "bench", "measure speed, where the benchmarks are installed", _REMEDY, " KIND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(args: Namespace) -> int:
    if find_spec(_PACKAGE) is None:
        raise ImportError(f"there is no package {_PACKAGE!r} here. {_REMEDY}")
    return int(import_module(f"{_PACKAGE}.run").run(args))
