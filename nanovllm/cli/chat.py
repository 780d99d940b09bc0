"""`nanovllm chat`: a conversation in the terminal, streamed; with piped input, each line is one turn.

Owns the loop and the history. Invariant: the history alternates user and assistant; a turn that was refused leaves no
trace in it.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator

from nanovllm.cli.options import engine_options
from nanovllm.cli.streaming import make_sampling_params, render_chat, stream_answer
from nanovllm.llm import LLM

_HELP = "/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer"


def run(args: Namespace) -> int:
    interactive = sys.stdin.isatty()
    with LLM(args.model, **engine_options(args)) as llm:
        params = make_sampling_params(llm, args, max_tokens=None)
        opening = [{"role": "system", "content": args.system}] if args.system else []
        history = list(opening)
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
            try:
                prompt = render_chat(llm, [*history, turn])
                answer = stream_answer(llm, prompt, params, lambda text: print(text, end="", flush=True))
            except ValueError as error:
                if not interactive:
                    raise
                print(f"error: {error} (/reset starts over)", file=sys.stderr)
                continue
            print()
            if answer is not None:
                history += [turn, {"role": "assistant", "content": answer.text}]
    return 0


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
