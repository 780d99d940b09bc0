"""`python -m nanovllm_bench.experts`: one mixture-of-experts layer, against the time its weights need from memory.

Owns that measurement. The default shape is that of Qwen3-30B-A3B. Invariant: repetitions choose experts of their own,
so that weights come from memory and not from a cache; on a GPU all of them are one CUDA graph, as in decoding.

    share = (bytes of the experts in use, read once) / bandwidth / (time of a layer)
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.routing import Routing
from nanovllm.layers.experts import ExpertNames, Experts
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.ops import choose_ops
from nanovllm_bench.timing import time_runs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m nanovllm_bench.experts", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--intermediate-size", type=int, default=768, help="of one expert")
    parser.add_argument("--num-experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 2048, 8192])
    parser.add_argument("--repetitions", type=int, default=16, help="layers in a row, each with its own tokens")
    parser.add_argument("--runs", type=int, default=20, help="the median of so many is reported")
    parser.add_argument("--bandwidth", type=float, default=4800, help="of the memory, GB/s; 4800 is an H200's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer, norm = _make_layer(args.hidden_size, args.intermediate_size, args.num_experts, args.top_k, dtype, device)
    bytes_of_expert = 3 * args.hidden_size * args.intermediate_size * dtype.itemsize
    print(f"{'tokens':>7} {'experts':>8} {'us':>9} {'slowest':>9} {'floor us':>9} {'share':>6} {'TFLOP/s':>8}")
    for batch_size in args.batch_sizes:
        xs = torch.randn(args.repetitions, batch_size, args.hidden_size, dtype=dtype, device=device)
        num_used = sum(_num_experts_in_use(layer, norm, x) for x in xs) / len(xs)
        times = time_runs(lambda xs=xs: [layer(norm, x, x)[0] for x in xs], args.runs, device)  # type: ignore[misc]
        seconds = median(times) / args.repetitions
        floor = num_used * bytes_of_expert / (args.bandwidth * 1e9)
        operations = 2 * batch_size * args.top_k * 3 * args.hidden_size * args.intermediate_size
        print(
            f"{batch_size:7} {num_used:8.1f} {seconds * 1e6:9.1f} {max(times) / args.repetitions * 1e6:9.1f} "
            f"{floor * 1e6:9.1f} {floor / seconds:6.1%} {operations / seconds / 1e12:8.1f}"
        )
    return 0


def _make_layer(
    hidden_size: int, intermediate_size: int, num_experts: int, top_k: int, dtype: torch.dtype, device: torch.device
) -> tuple[Experts, RMSNorm]:
    ops = choose_ops(device, "kernels")
    with device:
        layer = Experts(
            hidden_size, intermediate_size, num_experts, Routing(top_k), ExpertNames(), dtype, TensorParallel(), ops
        )
        norm = RMSNorm(hidden_size, 1e-6, dtype, ops)
        dict(layer.weights("mlp"))  # makes the router's weights
    for parameter in (*layer.parameters(), *norm.parameters()):
        parameter.data.normal_(std=hidden_size**-0.5)
    norm.weight.data.fill_(1.0)
    return layer, norm


def _num_experts_in_use(layer: Experts, norm: RMSNorm, x: Tensor) -> int:
    logits = layer.router(norm(x, x)[0])
    return int(logits.topk(layer.routing.top_k).indices.unique().numel())


if __name__ == "__main__":
    raise SystemExit(main())
