"""MXFP4 experts that are split over ranks, and those that a GPU holds, beside those that are whole."""

import pytest
import torch

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.moe import Gate, fused_experts
from nanovllm.layers.experts import ExpertNames, ExpertsSpec
from nanovllm.quantization.experts import QuantizedExperts, experts_by
from nanovllm.quantization.mxfp4 import Mxfp4Scheme


def experts_of(
    tp: TensorParallel, tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> QuantizedExperts:
    spec = ExpertsSpec(3, 64, 128, dtype, tp, fused_experts, Gate("clamped", 1.7, 2.0), is_interleaved=True)
    experts = experts_by(Mxfp4Scheme({"quant_method": "mxfp4"}), spec, "", ExpertNames(stacked=()))
    assert isinstance(experts, QuantizedExperts)
    for name, weight_spec in experts.weights("", ExpertNames(stacked=())):
        assert tuple(tensors[name].shape) == weight_spec.shape
        weight_spec.fill(tensors[name])
    experts.finish()
    return experts


def random_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    codes = {"gate_up_proj": (3, 256, 2), "down_proj": (3, 64, 4)}
    tensors = {f"mlp.experts.{name}_bias": torch.randn(shape[:2]) for name, shape in codes.items()}
    for name, shape in codes.items():
        tensors[f"mlp.experts.{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8)
        tensors[f"mlp.experts.{name}_scales"] = torch.randint(121, 125, shape, dtype=torch.uint8)
    return tensors


def test_what_ranks_make_adds_up_to_the_whole() -> None:
    tensors = random_tensors()
    given = torch.randn(5, 64), torch.rand(5, 2), torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [1, 2]]).int()
    whole = experts_of(TensorParallel(), tensors).mix(*given)
    parts = [experts_of(TensorParallel(rank, 2), tensors).mix(*given) for rank in range(2)]
    torch.testing.assert_close(parts[0] + parts[1], whole, atol=1e-4, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 5, 60, 1000])  # the last gets dense copies
def test_a_gpu_makes_the_same(num_tokens: int) -> None:
    tensors = random_tensors()
    x, weights = torch.randn(num_tokens, 64).bfloat16(), torch.rand(num_tokens, 2)
    expert_ids = torch.rand(num_tokens, 3).topk(2).indices.int()
    with torch.device("cuda"):
        on_gpu = experts_of(TensorParallel(), tensors, torch.bfloat16)
    assert on_gpu.gate_up.scale.shape == (2, 3 * 256)  # a group's lie side by side
    assert on_gpu.gate_up.weight.scale.cpu().equal(tensors["mlp.experts.gate_up_proj_scales"].flatten(0, 1)[_turned()])
    got = on_gpu.mix(x.cuda(), weights.cuda(), expert_ids.cuda()).cpu().float()
    want = experts_of(TensorParallel(), tensors).mix(x.float(), weights, expert_ids)
    assert (got - want).norm() / want.norm() < 1e-2


def _turned() -> torch.Tensor:
    """Of all experts' rows, gates and ups in turn: an expert's gates, its ups, and so on."""
    return torch.arange(3 * 256).unflatten(0, (3, 128, 2)).transpose(1, 2).flatten()
