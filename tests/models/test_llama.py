"""The decoder's layers as a rank of several holds them, from checkpoints of either layout."""

from dataclasses import replace

import pytest
import torch

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.ops import PLAIN, choose_ops
from nanovllm.model_config import ModelConfig
from nanovllm.models.llama import MLP, SelfAttention
from nanovllm.models.registry import read_model_config
from nanovllm.models.ungated import XIELUMLP, UngatedMLP

HIDDEN, HEADS, KV_HEADS, DIM = 32, 4, 2, 8


def config(share: float, is_neox_style: bool = True) -> ModelConfig:
    hf = {
        "architectures": ["Phi3ForCausalLM"],
        **{"vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "partial_rotary_factor": share},
    }
    return replace(read_model_config(hf, "float32"), is_neox_style=is_neox_style, qk_norm="head")


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("share", "is_neox_style", "order"),
    [
        (1.0, True, [0, 1, 2, 3, 4, 5, 6, 7]),
        (0.5, True, [0, 1, 4, 5, 2, 3, 6, 7]),
        (1.0, False, [0, 2, 4, 6, 1, 3, 5, 7]),
        (0.5, False, [0, 2, 4, 5, 1, 3, 6, 7]),
    ],
)
def test_one_tensor_or_three_fill_the_same_rows_of_each_rank(
    share: float, is_neox_style: bool, order: list[int], size: int
) -> None:
    """q, k and v, and the norms of their heads, in the order that kernels rotate in."""
    q, k, v = (torch.randn(heads * DIM, HIDDEN) for heads in (HEADS, KV_HEADS, KV_HEADS))
    for rank in range(size):
        tp = TensorParallel(rank, size)
        weights = []
        for names in ({"a.q_proj": q, "a.k_proj": k, "a.v_proj": v}, {"a.qkv_proj": torch.cat((q, k, v))}):
            attention = SelfAttention(config(share, is_neox_style), 0, torch.float32, tp, PLAIN)
            specs = dict(attention.weights("a"))
            for name, tensor in names.items():
                assert specs[f"{name}.weight"].shape == tensor.shape
                specs[f"{name}.weight"].fill(tensor)
            weights.append(attention.qkv_proj.method.weight)
        assert torch.equal(*weights)
        held = tp.part(HEADS, "heads"), tp.kv_heads(KV_HEADS), tp.kv_heads(KV_HEADS)
        orders = (order, order, list(range(DIM)))
        parts = zip((q, k, v), held, orders, strict=True)
        expected = [t.view(-1, DIM, HIDDEN)[h.start : h.stop, o].flatten(0, 1) for t, h, o in parts]
        assert torch.equal(weights[0], torch.cat(expected))
        for norm, name in ((attention.q_norm, "a.q_norm"), (attention.k_norm, "a.k_norm")):
            specs[f"{name}.weight"].fill(torch.arange(DIM))
            assert norm is not None and norm.weight.tolist() == order


@pytest.mark.parametrize("size", [1, 2])
def test_gate_and_up_in_one_tensor(size: int) -> None:
    gate, up = torch.randn(2, 16, HIDDEN)
    for rank in range(size):
        mlp = MLP(replace(config(1.0), activation="gelu_tanh"), 0, torch.float32, TensorParallel(rank, size), PLAIN)
        dict(mlp.weights("m"))["m.gate_up_proj.weight"].fill(torch.cat((gate, up)))
        rows = slice(rank * 16 // size, (rank + 1) * 16 // size)
        assert torch.equal(mlp.gate_up_proj.method.weight, torch.cat((gate[rows], up[rows])))


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu", "relu2", "xielu"])
def test_an_activation_without_a_kernel_is_deterministic_too(activation: str) -> None:
    """A row's bits do not depend on the rows beside it, where PyTorch treats the last numbers in another way."""
    ops = choose_ops(torch.device("cpu"), "kernels", is_deterministic=True)
    block = XIELUMLP if activation == "xielu" else UngatedMLP
    fields = {"activation": activation, "intermediate_size": 99}
    mlp = block(replace(config(1.0), **fields), 0, torch.float32, TensorParallel(), ops)
    for _, spec in mlp.weights("m"):
        spec.fill(torch.randn(spec.shape))
    up = 3 * torch.randn(7, 99)
    together = mlp.by_row(mlp.activate, up)
    assert torch.equal(together, torch.cat([mlp.by_row(mlp.activate, row) for row in up.split(1)]))
    torch.testing.assert_close(together, mlp.activate(up))
