"""`nanovllm bench attention`: attention of a prompt by itself, in floating-point operations a second.

Owns the step that is timed: one prompt, whole or behind a context, through the backend that an engine would choose for
one layer of the model's shape. Invariant: keys and values are random numbers in blocks in random order; scores beyond
the diagonal are not counted, and what an engine computes beside attention is left out.
"""

from argparse import Namespace
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from nanovllm import __version__
from nanovllm.build import choose_device, choose_dtype
from nanovllm.cli.options import engine_options
from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.executor.worker import choose_backend
from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.model_config import ModelConfig
from nanovllm.models.registry import read_model_config
from nanovllm.roofline.ceilings import measure_ceilings
from nanovllm.weights.checkpoint import open_checkpoint
from nanovllm_bench.report import print_record, print_table

_COLUMNS = {
    "prompt": "prompt_len", "behind": "context_len", "us": "us", "slowest": "slowest",
    "TFLOP/s": "teraflops_per_second", "of a product's": "share_of_flops",
}  # fmt: skip
_SECONDS = 0.2  # of calls in a row that make a run


@torch.inference_mode()
def run(args: Namespace) -> int:
    if min(args.lengths) < 2 or args.behind < 0:
        raise ValueError("--lengths must be at least 2, and --behind at least 0")
    asked = EngineConfig(model=args.model, **engine_options(args))
    hf = open_checkpoint(args.model, load_format="dummy", revision=asked.revision).config
    device = choose_device(asked.device)
    model = read_model_config(hf, choose_dtype(asked.dtype, hf, device))
    if model.latent is not None:
        raise NotImplementedError(f"{args.model}: attention over latents is not measured by itself")
    config = asked.resolve(model, device.type)
    peak = measure_ceilings(str(device), model.dtype).flops_per_second
    rows = []
    for length in args.lengths:
        seconds = _time(model, config, device, length, args.behind, args.repeats)
        rate = _operations(model, length, args.behind) / median(seconds)
        rows.append(
            {
                "engine": "nanovllm",
                "version": __version__,
                "workload": "attention",
                "prompt_len": length,
                "context_len": args.behind,
                "us": 1e6 * median(seconds),
                "slowest": 1e6 * max(seconds),
                "teraflops_per_second": rate / 1e12,
                "share_of_flops": f"{100 * rate / peak:.0f} %",
                "seconds": seconds,
            }
        )
    print_table(rows, _COLUMNS)
    shape = {"num_heads": model.num_heads, "num_kv_heads": model.num_kv_heads, "head_dim": model.head_dim}
    settings = {"dtype": model.dtype, "device": str(device), "repeats": args.repeats, **engine_options(args)}
    print_record(args, {"settings": settings, "shape": shape, "flops_per_second": peak, "results": rows})
    return 0


def _operations(model: ModelConfig, prompt_len: int, context_len: int) -> int:
    """Of q k^T and of the weights with the values, a multiplication and an addition each, up to the diagonal."""
    pairs = prompt_len * context_len + prompt_len * (prompt_len + 1) // 2
    return 4 * model.num_heads * model.head_dim * pairs


def _time(
    model: ModelConfig, config: ResolvedConfig, device: torch.device, prompt_len: int, context_len: int, repeats: int
) -> list[float]:
    """Seconds of one call, a figure for each run."""
    seq_len = prompt_len + context_len
    num_blocks = -(-seq_len // config.block_size)
    dtype = getattr(torch, model.dtype)
    backend = choose_backend(config, model, device)
    size = 2, num_blocks, model.num_kv_heads, config.block_size, model.head_dim
    cache = LayerCache(torch.randn(size, device=device).to(dtype))
    q = torch.randn(prompt_len, model.num_heads, model.head_dim, device=device).to(dtype)
    shape = AttentionShape(model.num_heads, model.num_kv_heads, model.head_dim, model.head_dim**-0.5)

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    prepared = backend.prepare(
        AttentionMetadata(
            query_start_loc=integers(0, prompt_len),
            seq_lens=integers(seq_len),
            block_table=torch.randperm(num_blocks, device=device).int()[None],
            slot_mapping=torch.empty(0, dtype=torch.int64, device=device),
            num_decodes=0,
            num_reqs=1,
            max_query_len=prompt_len,
            query_lens_host=[prompt_len],
            seq_lens_host=[seq_len],
        )
    )

    def several(count: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = perf_counter()
        for _ in range(count):
            backend.forward(shape, q, cache, prepared)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (perf_counter() - start) / count

    several(1)  # compiles, and plans for those that follow
    count = max(1, int(_SECONDS / several(1)))
    return [several(count) for _ in range(repeats)]
