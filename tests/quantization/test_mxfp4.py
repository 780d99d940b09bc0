"""MXFP4 experts that are split over ranks, beside those that are whole."""

import torch

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.moe import Gate, fused_experts
from nanovllm.layers.experts import ExpertNames, ExpertsSpec
from nanovllm.quantization.experts import QuantizedExperts, experts_by
from nanovllm.quantization.mxfp4 import Mxfp4Scheme


def experts_of(tp: TensorParallel, tensors: dict[str, torch.Tensor]) -> QuantizedExperts:
    spec = ExpertsSpec(3, 64, 128, torch.float32, tp, fused_experts, Gate("clamped", 1.7, 2.0), is_interleaved=True)
    experts = experts_by(Mxfp4Scheme({"quant_method": "mxfp4"}), spec, "", ExpertNames(stacked=()))
    assert isinstance(experts, QuantizedExperts)
    for name, weight_spec in experts.weights("", ExpertNames(stacked=())):
        assert tuple(tensors[name].shape) == weight_spec.shape
        weight_spec.fill(tensors[name])
    experts.finish()
    return experts


def test_what_ranks_make_adds_up_to_the_whole() -> None:
    torch.manual_seed(0)
    codes = {"gate_up_proj": (3, 256, 2), "down_proj": (3, 64, 4)}
    tensors = {f"mlp.experts.{name}_bias": torch.randn(shape[:2]) for name, shape in codes.items()}
    for name, shape in codes.items():
        tensors[f"mlp.experts.{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8)
        tensors[f"mlp.experts.{name}_scales"] = torch.randint(121, 125, shape, dtype=torch.uint8)
    given = torch.randn(5, 64), torch.rand(5, 2), torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [1, 2]]).int()
    whole = experts_of(TensorParallel(), tensors).mix(*given)
    parts = [experts_of(TensorParallel(rank, 2), tensors).mix(*given) for rank in range(2)]
    torch.testing.assert_close(parts[0] + parts[1], whole, atol=1e-4, rtol=1e-5)
