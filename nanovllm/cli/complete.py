"""`nanovllm complete`: prompts from arguments, a file or standard input; their continuations on standard output.

Owns reading and printing. Invariant: standard output holds generated text (or JSON) and nothing else; progress and
rates go to standard error.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

from nanovllm.cli.options import engine_options
from nanovllm.cli.streaming import make_sampling_params, stream_answer
from nanovllm.llm import LLM
from nanovllm.outputs import RequestOutput

_MAX_TOKENS = 256


def run(args: Namespace) -> int:
    prompts = _read_prompts(args)
    with LLM(args.model, **engine_options(args)) as llm:
        params = make_sampling_params(llm, args, _MAX_TOKENS)
        if len(prompts) == 1 and not args.json:
            answer = stream_answer(llm, prompts[0], params, _write)
            print()
            if answer is not None:
                print(f"[{answer.summary()}]", file=sys.stderr)
            return 0
        for number, output in enumerate(llm.generate(prompts, params, use_tqdm=sys.stderr.isatty()), start=1):
            print(_to_json(output) if args.json else f"=== {number}: {output.prompt}\n{output.outputs[0].text}\n")
    return 0


def _read_prompts(args: Namespace) -> list[str]:
    if args.file is not None:
        if args.prompts:
            raise ValueError("give prompts as arguments or with --file, not both")
        text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text(encoding="utf-8")
        prompts = [line for line in text.splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"{args.file} holds no prompt; put one on each line")
        return prompts
    if args.prompts:
        return list(args.prompts)
    text = "" if sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")
    if not text:
        raise ValueError("no prompt; give one as an argument, with --file, or on standard input")
    return [text]


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _to_json(output: RequestOutput) -> str:
    completion = output.outputs[0]
    record = {
        "prompt": output.prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_output_tokens": len(completion.token_ids),
    }
    return json.dumps(record, ensure_ascii=False)
