"""Granite 4: Mamba-2 layers beside attention, a shared MLP with or without experts beside it.

Owns the tensor names that are its own. Invariant: called and loaded as the blocks of `llama.py`, whose decoder is the
same.
"""

import torch
from torch import nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.ops import Ops
from nanovllm.layers.weight_specs import WeightSpecs, with_joined
from nanovllm.model_config import ModelConfig
from nanovllm.models.hf_fields import flag
from nanovllm.models.llama import MLP, SelfAttention
from nanovllm.models.mamba2 import Mamba2Mixer
from nanovllm.models.mixture import granite_moe


class GraniteMamba(Mamba2Mixer):
    def weights(self, name: str) -> WeightSpecs:
        return super().weights(name.removesuffix("self_attn") + "mamba")


class SharedMLP(MLP):
    """Gate and up projection are one matrix in the checkpoint."""

    def weights(self, name: str) -> WeightSpecs:
        block = f"{name.removesuffix('mlp')}shared_mlp"
        parts = list(self.gate_up_proj.weights(f"{block}.gate", f"{block}.up"))
        yield from with_joined(f"{block}.input_linear", parts)
        yield from self.down_proj.weights(f"{block}.output_linear")


def mixer(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    """What stands before the MLP."""
    if config.windows[layer_idx] is None:
        return SelfAttention(config, layer_idx, dtype, tp, ops)
    biases = {"conv_bias": flag(config.extra, "mamba_conv_bias"), "bias": flag(config.extra, "mamba_proj_bias")}
    return GraniteMamba(config, layer_idx, dtype, tp, ops, **biases)


def mlp(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    block = granite_moe if config.extra["num_local_experts"] else SharedMLP
    return block(config, layer_idx, dtype, tp, ops)
