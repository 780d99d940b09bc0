"""The flags of the kinds that time workloads on one engine after the other: throughput, latency, prefill and prefix.

Owns what can be typed for `measure.py`. Invariant: as in `arguments.py`.
"""

import argparse
from pathlib import Path

from nanovllm.cli.parsers import Commands, add_command


def add_throughput(kinds: Commands) -> argparse.ArgumentParser:
    throughput = add_command(
        kinds,
        "throughput",
        "tokens a second when all prompts are there at once",
        """\
examples:
  nanovllm bench throughput --batch-sizes 1 16 64 --compare hf
  nanovllm bench throughput --model Qwen/Qwen3-0.6B --workload offline
  nanovllm bench throughput --num-prompts 64 --output-len 128 --mixed
  nanovllm bench throughput --model Qwen/Qwen3-0.6B --workload groups --before ../nanovllm-last-week
""",
    )
    size = throughput.add_mutually_exclusive_group()
    size.add_argument("--num-prompts", type=int, metavar="N", help="prompts in the run (default: 64)")
    size.add_argument(
        "--batch-sizes", type=int, nargs="+", metavar="N", help="one run for each of these numbers of prompts"
    )
    size.add_argument(
        "--workload",
        nargs="+",
        metavar="NAME",
        help="fixed workloads: offline and offline_1024 are 256 and 1024 prompts of 100 to 1024 tokens with 100 to "
        "1024 output tokens each at temperature 0.6; long_prompts; groups and two_levels share prompts and prefixes; "
        "generate_256 beside stream_256, logprobs_256, penalty_256, bias_256, grammar_256; also those of other kinds, "
        "measured in their way",
    )
    throughput.add_argument(
        "--mixed", action="store_true", help="draw lengths between a quarter of the given ones and all of it"
    )
    throughput.add_argument("--input-len", type=int, metavar="N", help="prompt tokens (default: 64)")
    throughput.add_argument("--output-len", type=int, metavar="N", help="output tokens (default: 128)")
    return throughput


def add_latency(kinds: Commands) -> argparse.ArgumentParser:
    latency = add_command(
        kinds,
        "latency",
        "time to the first token, from token to token, and beside arriving prompts",
        """\
examples:
  nanovllm bench latency --batch-sizes 1 8 64
  nanovllm bench latency --model Qwen/Qwen3-0.6B --workload decode_1 decode_8 decode_64 ttft
  nanovllm bench latency --model Qwen/Qwen3-0.6B --arrivals --num-streams 32 --arrival-len 2048
""",
    )
    size = latency.add_mutually_exclusive_group()
    size.add_argument("--batch-sizes", type=int, nargs="+", metavar="N", help="prompts at once (default: 1)")
    size.add_argument(
        "--workload",
        nargs="+",
        metavar="NAME",
        help="fixed workloads: decode_N is N prompts of 128 tokens with 512 output tokens, context_N one prompt of N "
        "tokens with as many, ttft the first token of a prompt of 128",
    )
    size.add_argument(
        "--arrivals",
        action="store_true",
        help="the gaps between the tokens of running streams while prompts that want one token arrive",
    )
    latency.add_argument("--input-len", type=int, metavar="N", help="prompt tokens (default: 64)")
    latency.add_argument("--output-len", type=int, metavar="N", help="output tokens (default: 128)")
    group = latency.add_argument_group("with --arrivals")
    group.add_argument("--num-streams", type=int, default=32, metavar="N", help="running streams (default: 32)")
    group.add_argument("--arrival-len", type=int, default=2048, metavar="N", help="tokens of a prompt (default: 2048)")
    group.add_argument("--arrival-ms", type=float, default=100, metavar="X", help="time between two (default: 100)")
    group.add_argument("--seconds", type=float, default=10, metavar="X", help="length of a run (default: 10)")
    return latency


def add_prefill(kinds: Commands) -> argparse.ArgumentParser:
    prefill = add_command(
        kinds,
        "prefill",
        "prompt tokens a second",
        """\
examples:
  nanovllm bench prefill --model Qwen/Qwen3-0.6B
  nanovllm bench prefill --num-prompts 4 --input-len 512
""",
    )
    _add_workload_sizes(prefill, num_prompts=32, input_len=2048)
    return prefill


def add_prefix(kinds: Commands) -> argparse.ArgumentParser:
    prefix = add_command(
        kinds,
        "prefix",
        "output tokens a second of prompts with a common beginning that is in the prefix cache",
        """\
examples:
  nanovllm bench prefix --model Qwen/Qwen3-0.6B
  nanovllm bench prefix --num-prompts 16 --prefix-len 256 --output-len 32
""",
    )
    _add_workload_sizes(prefix, num_prompts=512, prefix_len=2048, input_len=64, output_len=128)
    return prefix


def add_measuring_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compare",
        nargs="+",
        choices=("hf", "vllm", "nano-vllm", "llama.cpp"),
        default=[],
        metavar="ENGINE",
        help="engines to measure in the same run: hf (transformers' generate, left-padded), vllm, nano-vllm, llama.cpp "
        "(of a GGUF file, on the CPU)",
    )
    parser.add_argument(
        "--before",
        type=Path,
        metavar="FOLDER",
        help="also measure another checkout of this repository, in the same call with the same options",
    )
    parser.add_argument(
        "--warm-up-len",
        type=int,
        metavar="N",
        help="output tokens of a request in the run that warms up, at most (default: as many as in the others)",
    )
    parser.add_argument(
        "--nano-vllm-python", metavar="PATH", help="the Python of the environment that nano-vllm is installed in"
    )


def _add_workload_sizes(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Flags for the sizes of a kind's one workload, which has its name with the default ones."""
    texts = {
        "num_prompts": "prompts in the run",
        "prefix_len": "tokens that all prompts begin with",
        "input_len": "prompt tokens of each prompt's own",
        "output_len": "output tokens",
    }
    for name, default in defaults.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{texts[name]} (default: {default})")
    parser.set_defaults(workload_defaults=defaults)
