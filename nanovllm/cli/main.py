"""The `nanovllm` command: read the arguments, load the command's module, turn errors into one clear line.

Owns dispatch and exit statuses: 0 done, 1 the command's own "no", 2 a mistake in the arguments or the model, 130
Ctrl-C.
Invariant: torch is imported only by the module of the command that runs.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from time import perf_counter

from nanovllm.cli.arguments import build_parser

_COMMANDS = {
    "complete": "nanovllm.cli.complete",
    "chat": "nanovllm.cli.chat",
    "demo": "nanovllm.cli.demo",
    "bench": "nanovllm.bench.run",
    "check-model": "nanovllm.cli.check_model",
    "models": "nanovllm.cli.models",
    "memory": "nanovllm.cli.memory",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` without the program's name, by default the process's. Returns the exit status."""
    start_time = perf_counter()
    args = build_parser().parse_args(argv)
    args.start_time = start_time
    args.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return int(import_module(_COMMANDS[args.command]).run(args))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, say `head`, has seen enough; what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, NotImplementedError, ImportError, RuntimeError, OSError) as error:
        if args.debug:
            raise
        print(f"nanovllm {args.command}: error: {str(error).strip() or type(error).__name__}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
