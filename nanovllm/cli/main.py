"""The `nanovllm` command: read the arguments, load the command's module, turn errors into one clear line.

Owns dispatch and exit statuses: 0 done, 1 the command's own "no", 2 a mistake in the arguments or the model, 130
Ctrl-C.
Invariant: torch is imported only by the module of the command that runs.
"""

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import Namespace

_START_TIME = perf_counter()

_COMMANDS = {
    "complete": "nanovllm.cli.complete",
    "chat": "nanovllm.cli.chat",
    "demo": "nanovllm.cli.demo",
    "batch": "nanovllm.cli.batch",
    "serve": "nanovllm.cli.serve",
    "top": "nanovllm.cli.top",
    "trace": "nanovllm.cli.trace",
    "bench": "nanovllm.cli.bench",
    "check-model": "nanovllm.cli.check_model",
    "check-logprobs": "nanovllm.cli.check_logprobs",
    "models": "nanovllm.cli.models",
    "memory": "nanovllm.cli.memory",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` without the program's name, by default the process's. Returns the exit status."""
    is_program = argv is None
    start_time = _START_TIME if is_program else perf_counter()
    try:
        if is_program:
            signal.signal(signal.SIGINT, _interrupt)
        from nanovllm.cli.arguments import parse_arguments  # here, so that Ctrl-C finds the lines around it

        args = parse_arguments(sys.argv[1:] if argv is None else list(argv))
        args.start_time = start_time
        return _run(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _run(args: "Namespace") -> int:
    try:
        return int(import_module(_COMMANDS[args.command]).run(args))
    except BrokenPipeError:  # the reader, say `head`, has seen enough; what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, NotImplementedError, ImportError, RuntimeError, OSError) as error:
        if args.debug:
            raise
        print(f"nanovllm {args.command}: error: {_in_words(error)}", file=sys.stderr)
        return 2


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C. In the middle of an import it ends the process: packages have been seen to swallow KeyboardInterrupt."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(sys.stderr.fileno(), b"\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _in_words(error: Exception) -> str:
    """The message, without the number that the operating system's errors begin with."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error).strip() or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
