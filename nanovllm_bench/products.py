"""`nanovllm bench products`: products with quantized weights by themselves, beside dense ones.

Owns which products those are, the four of a layer of the model's shape, and how each is timed; gemlite's, as a peer,
are in `gemlite_products.py`. Invariant: weights are random numbers, rounded as the option `quantization` rounds them,
and come from memory: calls in a row multiply by matrices of their own, more of them than a cache holds.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Protocol

import torch
from torch import Tensor

from nanovllm.build import choose_device, choose_dtype
from nanovllm.layers.linear_method import DenseLinear, LinearMethod, LinearSpec
from nanovllm.model_config import ModelConfig
from nanovllm.models.registry import read_model_config
from nanovllm.quantization.online import Online
from nanovllm.weights.checkpoint import open_checkpoint
from nanovllm_bench.report import print_record, print_table
from nanovllm_bench.timing import time_runs

_CACHE = 256 << 20  # bytes of matrices that no cache holds
_MOST_MATRICES = 64
_COLUMNS = {
    "product": "product", "inputs": "inputs", "outputs": "outputs", "rows": "rows", "by": "by", "form": "form",
    "us": "us", "slowest": "slowest", "GB/s": "gigabytes_per_second", "error": "error",
}  # fmt: skip


class Product(Protocol):
    """x [rows, inputs] -> [rows, outputs], with one matrix."""

    num_bytes: int  # of the matrix and its scales

    def __call__(self, x: Tensor) -> Tensor: ...


class _Ours:
    def __init__(self, form: str, dense: Tensor) -> None:
        self._method = _method(form, dense)
        self.num_bytes = sum(p.numel() * p.element_size() for p in self._method.parameters())

    def __call__(self, x: Tensor) -> Tensor:
        return self._method.multiply(x, None)


def _method(form: str, dense: Tensor) -> LinearMethod:
    outputs, inputs = dense.shape
    spec = LinearSpec((outputs,), (range(outputs),), inputs, range(inputs), dense.dtype, ("product",))
    with dense.device:
        method = DenseLinear(spec) if form == "dense" else Online(form)(spec)
    for _, weight in method.weights(0):
        weight.fill(dense)
    method.finish()
    return method


@torch.inference_mode()
def run(args: Namespace) -> int:
    if min(args.rows) < 1:
        raise ValueError("--rows must be at least 1")
    makers: dict[str, Callable[[str, Tensor], Product | None]] = {"nanovllm": _Ours}
    if args.compare:
        from nanovllm_bench.gemlite_products import load_gemlite

        makers["gemlite"] = load_gemlite()
    hf = open_checkpoint(args.model, load_format="dummy", revision=None).config
    device = choose_device(args.device)
    model = read_model_config(hf, choose_dtype(args.dtype, hf, device))
    dtype = getattr(torch, model.dtype)
    results = []
    for name, outputs, inputs in _products(model):
        dense = torch.randn(outputs, inputs, device=device).mul_(inputs**-0.5).to(dtype)
        for form in args.forms:
            for by, make in makers.items():
                products = _several(make, form, dense)
                if not products:
                    continue
                for rows in args.rows:
                    x = torch.randn(rows, inputs, device=device).to(dtype)
                    seconds = _time(products, x, args.repeats)
                    results.append(
                        {
                            "product": name,
                            "inputs": inputs,
                            "outputs": outputs,
                            "rows": rows,
                            "by": by,
                            "form": form,
                            "us": 1e6 * median(seconds),
                            "slowest": 1e6 * max(seconds),
                            "gigabytes_per_second": products[0].num_bytes / median(seconds) / 1e9,
                            "error": _error(products[0](x), x, dense),
                            "seconds": seconds,
                        }
                    )
    print_table(sorted(results, key=lambda row: (row["product"], row["rows"], row["form"])), _COLUMNS)
    settings = {"dtype": model.dtype, "device": str(device), "repeats": args.repeats, "compare": args.compare}
    print_record(args, {"settings": settings, "results": results})
    return 0


def _products(model: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """Name, outputs and inputs."""
    heads = model.num_heads * model.head_dim
    yield "qkv", heads + 2 * model.num_kv_heads * model.head_dim, model.hidden_size
    yield "o", model.hidden_size, heads
    yield "gate_up", 2 * model.intermediate_size, model.hidden_size
    yield "down", model.hidden_size, model.intermediate_size


def _several(make: Callable[[str, Tensor], Product | None], form: str, dense: Tensor) -> list[Product]:
    """Products with matrices enough; none where whoever makes them does not know the form."""
    first = make(form, dense)
    if first is None:
        return []
    count = min(_MOST_MATRICES, -(-_CACHE // first.num_bytes)) if dense.is_cuda else 1
    others = (make(form, dense) for _ in range(count - 1))
    return [first, *(product for product in others if product is not None)]


def _error(got: Tensor, x: Tensor, dense: Tensor) -> float:
    """|got - x W^T| / |x W^T|, with W before it was rounded."""
    want = x.float() @ dense.float().t()
    return float((got.float() - want).norm() / want.norm())


def _time(products: Sequence[Product], x: Tensor, repeats: int) -> list[float]:
    """Seconds of a product, a figure for each run of all of them; on a GPU a run is one CUDA graph."""

    def once() -> None:
        for product in products:
            product(x)

    return [seconds / len(products) for seconds in time_runs(once, repeats, x.device)]
