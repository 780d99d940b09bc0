"""The experts' layer: both checkpoint layouts fill the same weights, and the ranks' parts add up to the whole."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.routing import Routing
from nanovllm.layers.experts import ExpertNames, Experts
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.ops import PLAIN

EXPERTS, HIDDEN, INNER = 3, 8, 12
QWEN, MIXTRAL = ExpertNames(), ExpertNames("block_sparse_moe", "w1", "w3", "w2")


def make(tp: TensorParallel | None = None, names: ExpertNames = QWEN) -> Experts:
    layer = Experts(HIDDEN, INNER, EXPERTS, Routing(2), names, torch.float32, tp or TensorParallel(), PLAIN)
    dict(layer.weights("mlp"))  # makes the router's weights
    for parameter in layer.parameters():
        parameter.data.fill_(float("nan"))
    return layer


@pytest.fixture
def fused() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "mlp.gate.weight": torch.randn(EXPERTS, HIDDEN),
        "mlp.experts.gate_up_proj": torch.randn(EXPERTS, 2 * INNER, HIDDEN),
        "mlp.experts.down_proj": torch.randn(EXPERTS, HIDDEN, INNER),
    }


def one_by_one(fused: dict[str, Tensor], names: ExpertNames) -> Iterator[tuple[str, Tensor]]:
    yield f"{names.block}.gate.weight", fused["mlp.gate.weight"]
    for expert in range(EXPERTS):
        gate, up = fused["mlp.experts.gate_up_proj"][expert].chunk(2)
        down = fused["mlp.experts.down_proj"][expert]
        for name, tensor in ((names.gate, gate), (names.up, up), (names.down, down)):
            yield f"{names.block}.experts.{expert}.{name}.weight", tensor


def fill(layer: Experts, tensors: dict[str, Tensor]) -> Experts:
    specs = dict(layer.weights("mlp"))
    for name, tensor in tensors.items():
        assert tuple(tensor.shape) == specs[name].shape
        specs[name].fill(tensor)
    return layer


@pytest.mark.parametrize("names", [QWEN, MIXTRAL])
@pytest.mark.parametrize("tp", [TensorParallel(), TensorParallel(0, 2), TensorParallel(2, 3)])
def test_both_layouts_fill_the_same_weights(fused: dict[str, Tensor], names: ExpertNames, tp: TensorParallel) -> None:
    together = fill(make(tp, names), fused)
    apart = fill(make(tp, names), dict(one_by_one(fused, names)))
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        assert not one.isnan().any() and torch.equal(one, other)


@pytest.mark.parametrize("names", [QWEN, MIXTRAL])
def test_slots_that_stand_for_others_name_all_of_them(fused: dict[str, Tensor], names: ExpertNames) -> None:
    specs = dict(make(names=names).weights("mlp"))
    plain = {name for name, spec in specs.items() if not spec.instead_of}
    assert plain == dict(one_by_one(fused, names)).keys()
    replaced = [name for spec in specs.values() for name in spec.instead_of]
    assert len(replaced) == len(set(replaced)) and set(replaced) <= plain


@pytest.mark.parametrize("size", [2, 3])
def test_the_ranks_results_add_up(fused: dict[str, Tensor], size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank computes its part of every expert; the all-reduce that adds them is left out here."""
    monkeypatch.setattr(TensorParallel, "all_reduce", lambda self, x: x)
    norm = RMSNorm(HIDDEN, 1e-6, torch.float32, PLAIN)
    norm.weight.data.fill_(1.0)
    x, residual = torch.randn(5, HIDDEN), torch.randn(5, HIDDEN)
    whole, total = fill(make(), fused)(norm, x, residual)
    parts: list[Any] = [fill(make(TensorParallel(rank, size)), fused)(norm, x, residual) for rank in range(size)]
    torch.testing.assert_close(sum(part for part, _ in parts), whole)
    assert torch.equal(total, x + residual)


def test_an_intermediate_size_that_ranks_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=f"intermediate size of an expert = {INNER}.*5"):
        make(replace(TensorParallel(), size=5))
