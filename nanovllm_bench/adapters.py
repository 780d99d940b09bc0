"""`nanovllm bench adapters`: a decode step of rows with adapters, beside rows without and an engine without.

Owns random adapters of a model's shape, and what is compared. Invariant: all engines decode the same prompts; a figure
is the median time of a step once all prompts are computed, of the fastest of the runs.
"""

from argparse import Namespace
from statistics import median
from time import perf_counter
from typing import Any

import torch

from nanovllm.cli.options import engine_options
from nanovllm.llm import LLM
from nanovllm.lora.request import LoRARequest
from nanovllm.sampling_params import SamplingParams
from nanovllm_bench.report import print_record, print_table

_COLUMNS = {"rows": "num_rows", "adapters": "adapters", "ms/step": "step_ms", "x without": "times"}
_NUM_PROMPT_TOKENS = 32


def run(args: Namespace) -> int:
    if min(args.batch_sizes) < 1 or args.num_adapters < 1 or args.output_len < 2 or args.rank < 1:
        raise ValueError("--batch-sizes, --num-adapters and --rank must be at least 1, and --output-len at least 2")
    options = {**engine_options(args), "skip_tokenizer_init": True, "enable_prefix_caching": False}
    options["max_num_seqs"] = max(args.batch_sizes)
    with LLM(args.model, **options) as llm:
        rows = [_row(llm, args, num_rows, "off", [None]) for num_rows in args.batch_sizes]
    lora = {"enable_lora": True, "max_loras": args.num_adapters, "max_lora_rank": args.rank}
    with LLM(args.model, **options, **lora) as llm:
        adapters = random_adapters(llm, args.num_adapters, args.rank)
        for num_rows in args.batch_sizes:
            rows.append(_row(llm, args, num_rows, "no row's", [None]))
            rows.append(_row(llm, args, num_rows, str(min(num_rows, args.num_adapters)), adapters))
    without = {row["num_rows"]: row["step_ms"] for row in rows if row["adapters"] == "off"}
    for row in rows:
        row["times"] = row["step_ms"] / without[row["num_rows"]]
    rows.sort(key=lambda row: int(row["num_rows"]))  # stable
    print_table(rows, _COLUMNS)
    print_record(args, {"options": options, "rank": args.rank, "results": rows})
    return 0


def random_adapters(llm: LLM, number: int, rank: int) -> list[LoRARequest]:
    """Of all linear layers between embedding and head, as small as trained ones are."""
    shapes: dict[str, tuple[int, int]] = llm.apply_model(layer_shapes)[0]
    adapters = []
    for seed in range(number):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for module, (outputs, inputs) in shapes.items():
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
            tensors[f"{module}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.01
        adapters.append(LoRARequest(f"random {seed}", tensors, {"r": rank, "lora_alpha": rank}))
        llm.add_lora(adapters[-1])
    return adapters


def layer_shapes(model: Any) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each, by its name in a checkpoint."""
    shapes: dict[str, tuple[int, int]] = {}
    for layer in model.layers.modules():
        spec = getattr(layer, "spec", None)
        if spec is not None and hasattr(layer, "method"):
            shapes.update((name, (size, spec.in_features)) for name, size in zip(spec.names, spec.sizes, strict=True))
    return shapes


def _row(
    llm: LLM, args: Namespace, num_rows: int, what: str, adapters: list[LoRARequest] | list[None]
) -> dict[str, Any]:
    params = SamplingParams(temperature=0, max_tokens=args.output_len, ignore_eos=True)
    vocab_size, fastest = llm.model_config.vocab_size, float("inf")
    for _ in range(1 + args.repeats):  # the first compiles and captures
        for row in range(num_rows):
            prompt = [(13 * row + 7 * i) % vocab_size for i in range(_NUM_PROMPT_TOKENS)]
            llm.add_request(prompt, params, lora_request=adapters[row % len(adapters)])
        seconds = []
        while llm.has_unfinished_requests():
            start = perf_counter()
            outputs = llm.step()
            if len(outputs) == num_rows and len(outputs[0].outputs[0].token_ids) > 1:
                seconds.append(perf_counter() - start)
        fastest = min(fastest, median(seconds))
    return {"num_rows": num_rows, "adapters": what, "step_ms": 1e3 * fastest}
