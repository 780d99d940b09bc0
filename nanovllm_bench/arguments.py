"""The flags of `nanovllm bench`, kind by kind; of those that `measure.py` times, they are in `measure_arguments.py`.

Owns what can be typed; what happens then is in the module that `run.py` names for each kind. Invariant: importing and
building this takes milliseconds, so `--help` never waits for torch.
"""

import argparse

from nanovllm.cli.options import add_engine_options
from nanovllm.cli.parsers import MODEL_HELP, Commands, add_command
from nanovllm.config import KV_CACHE_DTYPES, QUANTIZATIONS
from nanovllm.speculative_config import MODEL_METHODS
from nanovllm_bench.measure_arguments import add_latency, add_measuring_options, add_prefill, add_prefix, add_throughput

CACHE_FORMS = {f"kv_{kind}": kind for kind in KV_CACHE_DTYPES if kind != "auto"}  # of `bench quality`: the cache alone
FORMS = (*QUANTIZATIONS, *CACHE_FORMS)


def add_bench(commands: Commands) -> None:
    parser = add_command(
        commands,
        "bench",
        "measure speed, and what each part of it is worth",
        """\
A table, then one JSON line with hardware, versions and every single run. Prompts are random token ids;
every run starts with an empty prefix cache, unless its workload is about a shared prefix.
""",
        " KIND",
    )
    kinds = parser.add_subparsers(prog="nanovllm bench", dest="kind", metavar="KIND", required=True, title="kinds")
    for add in (add_throughput, add_latency, add_prefill, add_prefix):
        kind = add(kinds)
        _add_record_options(kind)
        add_measuring_options(kind)
        add_engine_options(kind, exclude=["skip_tokenizer_init", "tokenizer"])
    start = _add_start(kinds)
    _add_record_options(start)
    add_engine_options(start, exclude=["tokenizer"])
    ablation = _add_ablation(kinds)
    _add_record_options(ablation)
    add_engine_options(ablation, exclude=["skip_tokenizer_init", "tokenizer"])
    parallel = _add_parallel(kinds)
    _add_record_options(parallel)
    add_engine_options(
        parallel, exclude=["skip_tokenizer_init", "tokenizer", "tensor_parallel_size", "data_parallel_size"]
    )
    serve = _add_serve(kinds)
    _add_record_options(serve)
    add_engine_options(serve, exclude=["skip_tokenizer_init", "tokenizer", "engine_process"])
    quality = _add_quality(kinds)
    _add_model_and_output(quality)
    add_engine_options(quality, exclude=["skip_tokenizer_init", "quantization", "kv_cache_dtype", "engine_process"])
    speculation = _add_speculation(kinds)
    _add_record_options(speculation)
    add_engine_options(speculation, exclude=["skip_tokenizer_init", "speculative_config"])
    adapters = _add_adapters(kinds)
    _add_record_options(adapters)
    excluded = ["enable_lora", "max_loras", "max_lora_rank", "max_cpu_loras", "max_num_seqs", "enable_prefix_caching"]
    add_engine_options(adapters, exclude=["skip_tokenizer_init", "tokenizer", *excluded])
    attention = _add_attention(kinds)
    _add_record_options(attention)
    add_engine_options(attention, exclude=["skip_tokenizer_init", "tokenizer", "engine_process"])
    _add_products(kinds)
    _add_chart(kinds)


def _add_start(kinds: Commands) -> argparse.ArgumentParser:
    start = add_command(
        kinds,
        "start",
        "where the time goes from the start of a process to its first token",
        """\
Cold is a start with empty caches of compiled kernels, warm one with what the cold start left there.

examples:
  nanovllm bench start
  nanovllm bench start --model Qwen/Qwen3-0.6B --repeat 3
  nanovllm bench start --model ./only-a-config --load-format dummy --skip-tokenizer-init
  nanovllm bench start --model Qwen/Qwen3-0.6B --first-use
""",
    )
    start.add_argument(
        "--first-use", action="store_true", help="instead, the first and the second time of each kind of step"
    )
    return start


def _add_ablation(kinds: Commands) -> argparse.ArgumentParser:
    ablation = add_command(
        kinds,
        "ablation",
        "what each optimization is worth: each is switched off alone",
        """\
Every measurement is a process of its own. What a device does not have is left out.

examples:
  nanovllm bench ablation
  nanovllm bench ablation --model Qwen/Qwen3-0.6B --repeat 3
  nanovllm bench ablation --only "CUDA graphs" overlap
""",
    )
    ablation.add_argument(
        "--only", nargs="+", metavar="NAME", help="these optimizations, by name or a part of it (default: all)"
    )
    return ablation


def _add_parallel(kinds: Commands) -> argparse.ArgumentParser:
    parallel = add_command(
        kinds,
        "parallel",
        "several devices beside one, by tensor and by data parallelism",
        """\
Each layout runs the same workloads as one device, and its greedy tokens in float32 must be the same.

examples:
  nanovllm bench parallel --model Qwen/Qwen3-8B --tensor-parallel-sizes 1 2 4 --data-parallel-sizes 2 4
  nanovllm bench parallel --device cpu --tensor-parallel-sizes 1 3 --batch-sizes 1 8
""",
    )
    for name, default, text in (
        ("tensor", [1, 2], "devices that share the model"),
        ("data", [], "engines that share the requests"),
    ):
        parallel.add_argument(
            f"--{name}-parallel-sizes",
            type=int,
            nargs="+",
            default=default,
            metavar="N",
            help=f"numbers of {text} (default: {' '.join(map(str, default)) or 'none'})",
        )
    parallel.add_argument(
        "--workload", nargs="+", metavar="NAME", help="fixed workloads (default: offline prefill decode_1 decode_64)"
    )
    parallel.add_argument(
        "--batch-sizes", type=int, nargs="+", metavar="N", help="instead, so many prompts of the lengths below"
    )
    parallel.add_argument("--input-len", type=int, default=64, metavar="N", help="prompt tokens (default: 64)")
    parallel.add_argument("--output-len", type=int, default=32, metavar="N", help="output tokens (default: 32)")
    return parallel


def _add_serve(kinds: Commands) -> argparse.ArgumentParser:
    serve = add_command(
        kinds,
        "serve",
        "first tokens and gaps of a server's streams while requests arrive",
        """\
Without --url the engine alone is measured first, then `nanovllm serve` with the same model and options.
Each gets the same requests at the same times, and ignores the end of text.

examples:
  nanovllm bench serve --num-prompts 64
  nanovllm bench serve --model Qwen/Qwen3-0.6B --num-prompts 1000 --request-rate 50 --goodput ttft:100 tpot:10
  nanovllm bench serve --url http://127.0.0.1:8000 http://127.0.0.1:9000 --chat
""",
    )
    serve.add_argument(
        "--url", nargs="+", default=[], metavar="URL", help="measure OpenAI-compatible servers that run already"
    )
    serve.add_argument("--api-key", metavar="KEY", help="for the servers of --url")
    serve.add_argument("--chat", action="store_true", help="conversations instead of prompts of token ids")
    serve.add_argument("--num-prompts", type=int, default=64, metavar="N", help="requests in a run (default: 64)")
    serve.add_argument("--input-len", type=int, default=128, metavar="N", help="prompt tokens (default: 128)")
    serve.add_argument("--output-len", type=int, default=128, metavar="N", help="output tokens (default: 128)")
    serve.add_argument(
        "--mixed", action="store_true", help="draw lengths between a quarter of the given ones and all of it"
    )
    serve.add_argument(
        "--request-rate", type=float, default=float("inf"), metavar="X",
        help="arrivals a second on average, at random times (default: all at once)",
    )  # fmt: skip
    serve.add_argument("--max-concurrency", type=int, metavar="N", help="unanswered requests at a time (default: any)")
    serve.add_argument(
        "--goodput", nargs="+", default=[], metavar="NAME:MS",
        help="count requests within these limits: ttft (first token), tpot (mean gap), e2el (whole answer)",
    )  # fmt: skip
    serve.add_argument(
        "--num-alone", type=int, default=20, metavar="N",
        help="requests sent one by one at the end, for the first token of an idle server (default: 20)",
    )  # fmt: skip
    serve.add_argument(
        "--idle-connections", type=int, default=0, metavar="N", help="connections that stay open beside (default: 0)"
    )
    return serve


def _add_adapters(kinds: Commands) -> argparse.ArgumentParser:
    adapters = add_command(
        kinds,
        "adapters",
        "a decode step with LoRA adapters, beside one without",
        """\
Random adapters of all layers, dealt out over the rows.

examples:
  nanovllm bench adapters
  nanovllm bench adapters --model Qwen/Qwen3-8B --load-format dummy --num-adapters 8 --batch-sizes 1 256
""",
    )
    adapters.add_argument(
        "--batch-sizes", type=int, nargs="+", default=(1, 8), metavar="N", help="rows of a step (default: 1 8)"
    )
    adapters.add_argument("--num-adapters", type=int, default=8, metavar="N", help="(default: %(default)s)")
    adapters.add_argument("--rank", type=int, default=16, metavar="N", help="of each (default: %(default)s)")
    adapters.add_argument("--output-len", type=int, default=64, metavar="N", help="(default: %(default)s)")
    return adapters


def _add_attention(kinds: Commands) -> argparse.ArgumentParser:
    attention = add_command(
        kinds,
        "attention",
        "attention of a prompt by itself, in operations a second",
        """\
One layer of the model's shape, from its config alone.

examples:
  nanovllm bench attention --model Qwen/Qwen3-0.6B
  nanovllm bench attention --model Qwen/Qwen3-0.6B --lengths 16384 --behind 16384
""",
    )
    attention.add_argument(
        "--lengths", type=int, nargs="+", default=(2048, 8192, 32768), metavar="N",
        help="tokens of the prompt, one run for each (default: 2048 8192 32768)",
    )  # fmt: skip
    attention.add_argument(
        "--behind", type=int, default=0, metavar="N", help="tokens that are there already (default: 0)"
    )
    return attention


def _add_products(kinds: Commands) -> None:
    products = add_command(
        kinds,
        "products",
        "products with quantized weights by themselves",
        """\
The four products of one layer of the model's shape, from its config alone: "dense" as they are, others rounded
as the option `quantization` rounds them.

examples:
  nanovllm bench products --model Qwen/Qwen3-8B
  nanovllm bench products --model Qwen/Qwen3-8B --rows 1 16 64 --forms int4 int8 fp8 --compare gemlite
""",
    )
    _add_record_options(products)
    products.add_argument(
        "--rows", type=int, nargs="+", default=(1, 16, 64), metavar="N", help="of inputs (default: 1 16 64)"
    )
    forms = ("dense", "fp8", "int8", "int4")
    products.add_argument(
        "--forms", nargs="+", choices=forms, default=forms, metavar="FORM", help=f"(default: {' '.join(forms)})"
    )
    products.add_argument("--compare", choices=("gemlite",), help="a library whose products are timed as well")
    products.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    products.add_argument("--dtype", default="auto", help="of inputs (default: %(default)s)")


def _add_speculation(kinds: Commands) -> argparse.ArgumentParser:
    speculation = add_command(
        kinds,
        "speculation",
        "tokens a step and time with drafts, beside none",
        """\
One request at a time, greedily; the plain engine first.

examples:
  nanovllm bench speculation
  nanovllm bench speculation --tasks edit chat --methods ngram --num-speculative-tokens 4 8
  nanovllm bench speculation --model Qwen/Qwen3-8B --methods draft_model --draft-model Qwen/Qwen3-0.6B
""",
    )
    tasks = ("copy", "edit", "summary", "chat", "code")
    speculation.add_argument(
        "--tasks", nargs="+", choices=tasks, default=tasks, metavar="TASK", help=f"of {', '.join(tasks)} (default: all)"
    )
    speculation.add_argument(
        "--methods",
        nargs="+",
        choices=("ngram", "suffix", *MODEL_METHODS),
        default=("ngram", "suffix"),
        metavar="METHOD",
        help=f"of ngram, suffix, {', '.join(MODEL_METHODS)} (default: the first two)",
    )
    speculation.add_argument(
        "--num-speculative-tokens",
        dest="lengths",
        type=int,
        nargs="+",
        default=(4, 8),
        metavar="K",
        help="most tokens of a draft, one run for each (default: 4 8)",
    )
    speculation.add_argument(
        "--draft-model", metavar="MODEL", help="the model, or head, of draft_model, eagle3 and dflash"
    )
    speculation.add_argument("--max-tokens", type=int, default=128, metavar="N", help="of an answer (%(default)s)")
    return speculation


def _add_quality(kinds: Commands) -> argparse.ArgumentParser:
    quality = add_command(
        kinds,
        "quality",
        "what weights of fewer bits cost: perplexity, divergence and greedy agreement",
        """\
Every form reads the same text, and is compared with the model as its checkpoint has it.

examples:
  nanovllm bench quality
  nanovllm bench quality --model Qwen/Qwen3-0.6B --forms fp8 kv_fp8 --text book.txt
""",
    )
    quality.add_argument(
        "--forms",
        nargs="+",
        choices=FORMS,
        metavar="FORM",
        help=f"of {', '.join(FORMS)} (default: all)",
    )
    quality.add_argument("--text", metavar="FILE", help="the text that is read (default: one that comes with this)")
    quality.add_argument(
        "--window", type=int, default=256, metavar="N", help="tokens that are read at once (%(default)s)"
    )
    quality.add_argument("--windows", type=int, default=8, metavar="N", help="of the text, at most (%(default)s)")
    return quality


def _add_chart(kinds: Commands) -> None:
    chart = add_command(
        kinds,
        "chart",
        "draw engines beside each other, from the JSON lines of other kinds",
        """\
Needs matplotlib: pip install "nanovllm[bench]"

examples:
  nanovllm bench chart benchmarks/h200*.jsonl --compared-only -o benchmarks/h200.svg
""",
        " FILE [FILE ...]",
    )
    chart.add_argument("files", nargs="+", metavar="FILE", help="JSON lines, as the other kinds print them")
    chart.add_argument("--output", "-o", required=True, metavar="FILE", help="the picture: .svg or .png")
    chart.add_argument("--compared-only", action="store_true", help="leave out what only one engine has a figure of")


def _add_record_options(parser: argparse.ArgumentParser) -> None:
    _add_model_and_output(parser)
    parser.add_argument(
        "--repeat",
        "--repeats",
        dest="repeats",
        type=int,
        default=3,
        metavar="N",
        help="measured runs, after one to warm up (default: 3)",
    )


def _add_model_and_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", "-m", default="demo", help=f"{MODEL_HELP} (default: demo)")
    parser.add_argument("--output", "-o", metavar="FILE", help="also append the JSON line to this file")
