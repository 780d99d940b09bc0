"""How a command's parser looks: usage, description, examples, width of the help.

Owns the form; what can be typed is in `arguments.py`, and for the benchmarks in a package of their own. Invariant:
whatever is mistyped, the usage that is shown is that of the command it was typed for.
"""

import argparse
import shutil
from difflib import get_close_matches
from typing import NoReturn, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

MODEL_HELP = 'a folder, a .gguf file, a Hugging Face Hub name, or "demo"'


def make_parser(name: str, description: str, epilog: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=name, description=description, epilog=epilog, formatter_class=_formatter)


def add_command(
    commands: Commands, name: str, summary: str, epilog: str, arguments: str = ""
) -> argparse.ArgumentParser:
    """A parser for one command. arguments: those without a flag, as the usage shows them."""
    parser = commands.add_parser(name, help=summary, formatter_class=_formatter)
    parser.usage = f"{parser.prog} [options]{arguments}"
    parser.description = summary[0].upper() + summary[1:] + "."
    parser.epilog = epilog
    parser.set_defaults(parser=parser)  # of the command that was typed
    return parser


def refuse_unknown(parser: argparse.ArgumentParser, unknown: list[str]) -> NoReturn:
    """End with the command's usage and, for a misspelt flag, the right one."""
    flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    hints = []
    for argument in unknown:
        nearest = get_close_matches(argument.partition("=")[0], flags, n=1) if argument.startswith("-") else []
        hints.append(f"{argument} (did you mean {nearest[0]}?)" if nearest else argument)
    parser.error(f"unrecognized arguments: {' '.join(hints)}")


def _formatter(prog: str) -> argparse.HelpFormatter:
    width = min(shutil.get_terminal_size().columns, 110)
    formatter = argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=width)
    formatter._action_max_length = (
        14  # argparse forgets the indentation of subcommands when it measures the left column
    )
    return formatter
