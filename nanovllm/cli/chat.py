"""`nanovllm chat`: a conversation in the terminal, streamed; with piped input, each line is one turn.

Owns the loop and the history. Invariant: the history alternates user and assistant; a turn that was refused leaves no
trace in it.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial

from nanovllm.cli.streaming import lora_of, make_sampling_params, start_llm, stream_chat

_HELP = "/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer"


def run(args: Namespace) -> int:
    interactive = sys.stdin.isatty()
    with start_llm(args, _chosen_model(args)) as llm:
        params = make_sampling_params(llm, args, max_tokens=None)
        opening = [{"role": "system", "content": args.system}] if args.system else []
        history = list(opening)
        write = partial(print, end="", flush=True)
        if interactive:
            print(f"{_HELP}, /help shows this line")
        for line in _typed_lines() if interactive else _piped_lines():
            if line in ("/exit", "/quit"):
                break
            if line == "/reset":
                history = list(opening)
                continue
            if line == "/help":
                print(_HELP)
                continue
            turn = {"role": "user", "content": line}
            answer = None
            try:
                answer = stream_chat(llm, [*history, turn], params, write, lora_of(args))
            except KeyboardInterrupt:  # a second one, before the first had taken effect
                if not interactive:
                    raise
            except ValueError as error:
                if not interactive:
                    raise
                print(f"error: {error} (/reset starts over)", file=sys.stderr)
                continue
            print()
            if answer is not None:
                history += [turn, {"role": "assistant", "content": answer.text}]
    return 0


def _chosen_model(args: Namespace) -> str:
    if args.model is not None and args.positional_model is not None:
        raise ValueError(
            f"give the model once: as an argument ({args.positional_model}) or with --model ({args.model})"
        )
    return args.model or args.positional_model or "demo"


def _typed_lines() -> Iterator[str]:
    import readline  # noqa: F401  gives input() line editing and a history; absent from some builds, so only here

    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)")
            continue
        if line:
            yield line


def _piped_lines() -> Iterator[str]:
    return filter(None, (line.strip() for line in sys.stdin))
