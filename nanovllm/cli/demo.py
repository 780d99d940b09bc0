"""`nanovllm demo`: the demo model answers three questions as you watch, then a batch shows what batching gives.

Owns the show. Invariant: needs nothing but the installed package, and no network once the model is in the cache.
"""

import sys
from argparse import Namespace
from dataclasses import replace
from time import perf_counter

from nanovllm.cli.streaming import start_llm, stream_chat

_QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in two sentences.",
    "Write a short poem about the sea.",
)
_BATCH_SIZE = 16


def run(args: Namespace) -> int:
    with start_llm(args, "demo") as llm:
        params = replace(llm.get_default_sampling_params(), max_tokens=args.max_tokens, temperature=0.0)
        for question in _QUESTIONS:
            print(f"> {question}")
            turn = {"role": "user", "content": question}
            answer = stream_chat(llm, [turn], params, lambda text: print(text, end="", flush=True))
            print(f"\n[{answer.summary()}]\n" if answer else "\n")
        conversations = [
            [{"role": "user", "content": f"Tell me something about the number {number}."}]
            for number in range(_BATCH_SIZE)
        ]
        start = perf_counter()
        outputs = llm.chat(conversations, params, use_tqdm=sys.stderr.isatty() and not args.quiet)
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        rate = num_tokens / (perf_counter() - start)
        print(f"{_BATCH_SIZE} requests at once: {num_tokens} output tokens, {rate:.1f} tok/s")
    return 0
