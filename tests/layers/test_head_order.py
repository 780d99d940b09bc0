"""Heads in another order, where the codes of quantized weights must stay where they are."""

from typing import Any

import torch

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.head_order import ReorderedOutputs, reordered_specs
from nanovllm.layers.linear import QKVParallelLinear
from nanovllm.layers.ops import PLAIN
from nanovllm.layers.weight_specs import WeightSpec


class Around(torch.nn.Module):
    """Stands around a layer's method, as adapters do."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base


def test_outputs_are_put_in_order_once_however_often_weights_are_listed() -> None:
    layer: Any = QKVParallelLinear(8, 4, 2, 1, False, torch.float32, TensorParallel(), PLAIN)
    names = ("q_proj", "k_proj", "v_proj")
    dict(layer.weights(*names))  # makes its method
    codes = [(f"{name}.codes", WeightSpec((2, 2), lambda tensor: None, outputs=1)) for name in names]
    order = torch.tensor([0, 2, 1, 3])
    assert reordered_specs(layer, codes, order) == codes
    assert isinstance(layer.method, ReorderedOutputs)
    layer.method = around = Around(layer.method)
    assert reordered_specs(layer, codes, order) == codes
    assert layer.method is around
