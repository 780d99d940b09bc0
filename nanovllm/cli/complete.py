"""`nanovllm complete`: prompts from arguments, a file or standard input; their continuations on standard output.

Owns reading and printing. Invariant: standard output holds generated text (or JSON) and nothing else; progress and
rates go to standard error.
"""

import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from nanovllm.cli.streaming import lora_of, make_sampling_params, start_llm, stream_answer
from nanovllm.llm import LLM
from nanovllm.lora.request import LoRARequest
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

_MAX_TOKENS = 256


def run(args: Namespace) -> int:
    prompts = _read_prompts(args)
    with start_llm(args, args.model) as llm:
        params, adapter = make_sampling_params(llm, args, _MAX_TOKENS), lora_of(args)
        if len(prompts) == 1 and not args.json:
            answer = stream_answer(llm, prompts[0], params, _write, adapter)
            print()
            if answer is not None and not args.quiet:
                print(f"[{answer.summary()}]", file=sys.stderr)
            return 0
        show_progress = sys.stderr.isatty() and not args.quiet
        if args.json:
            _write_json(llm, prompts, params, adapter, show_progress)
            return 0
        outputs = llm.generate(prompts, params, use_tqdm=show_progress, lora_request=adapter)
        for number, output in enumerate(outputs, start=1):
            print(f"=== {number}: {output.prompt}\n{output.outputs[0].text}\n")
    return 0


def _write_json(
    llm: LLM, prompts: list[str], params: SamplingParams, adapter: LoRARequest | None, show_progress: bool
) -> None:
    """A line for each answer as soon as it is whole, so that what is interrupted keeps what is done."""
    params = replace(params, output_kind=RequestOutputKind.FINAL_ONLY)
    indices = {llm.add_request(prompt, params, lora_request=adapter): index for index, prompt in enumerate(prompts)}
    with tqdm(total=len(prompts), desc="Generating", unit=" prompts", disable=not show_progress) as progress:
        while llm.has_unfinished_requests():
            for output in llm.step():
                print(_to_json(indices[output.request_id], output), flush=True)
                progress.update()


def _read_prompts(args: Namespace) -> list[str]:
    if args.file is not None:
        if args.prompts:
            raise ValueError("give prompts as arguments or with --file, not both")
        text = sys.stdin.read() if args.file == "-" else _read_file(args.file)
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


def _read_file(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"there is no file {name!r} (looked in {Path.cwd()}); --file takes one with a prompt on each line, or '-' "
            "for standard input"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"the file {name!r} is not text in UTF-8 ({error})") from error


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _to_json(index: int, output: RequestOutput) -> str:
    completion = output.outputs[0]
    record = {
        "index": index,
        "prompt": output.prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_output_tokens": len(completion.token_ids),
    }
    return json.dumps(record, ensure_ascii=False)
