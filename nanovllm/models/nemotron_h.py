"""Nemotron-H (NVIDIA, 2025): Mamba-2 and attention layers, behind most of which stands an MLP without a gate.

In the place of an MLP may stand experts (Nemotron 3). Checkpoints count each of these as a layer with a norm of its
own; here what stands behind a mixer is its layer's MLP. Owns that order, and the names of the family's tensors.
Invariant: called and loaded as the blocks of `llama.py`, whose decoder is the same.
"""

from typing import Any

import torch
from torch import Tensor, nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.moe import Gate
from nanovllm.layers.experts import ExpertNames, Experts
from nanovllm.layers.norm import NoNorm, RMSNorm
from nanovllm.layers.ops import Ops
from nanovllm.layers.ungated_experts import UngatedSharedExpert
from nanovllm.layers.weight_specs import WeightSpecs
from nanovllm.model_config import ModelConfig
from nanovllm.models.hf_fields import flag, integer
from nanovllm.models.llama import LlamaForCausalLM, SelfAttention
from nanovllm.models.mamba2 import Mamba2Mixer
from nanovllm.models.mamba_families import nemotron_layers
from nanovllm.models.mixture import deepseek_routing
from nanovllm.models.ungated import UngatedMLP

_EXPERT_NAMES = ExpertNames(block="mixer", stacked=())


class NoMLP(nn.Module):
    """What stands where a mixer is followed by the next one."""

    def forward(self, norm: RMSNorm | NoNorm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return x, residual

    def weights(self, name: str) -> WeightSpecs:
        yield from ()


def mixer(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    if config.windows[layer_idx] is None:
        return SelfAttention(config, layer_idx, dtype, tp, ops)
    biases = {"conv_bias": flag(config.extra, "use_conv_bias"), "bias": flag(config.extra, "use_bias")}
    return Mamba2Mixer(config, layer_idx, dtype, tp, ops, **biases)


def mlp(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    layer = nemotron_layers(config.extra)[layer_idx]
    if layer.mlp is None:
        return NoMLP()
    return (_experts if layer.has_experts else UngatedMLP)(config, layer_idx, dtype, tp, ops)


def _experts(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    """DeepSeek-V3's routing, and experts without a gate."""
    fields = config.extra
    if config.activation != "relu2":
        raise ValueError(f"{config.architecture} with experts and another mlp_hidden_act than 'relu2' is not supported")
    shared_size, bias = integer(fields, "moe_shared_expert_intermediate_size"), config.mlp_bias
    shared = UngatedSharedExpert(config.hidden_size, shared_size, bias, "mixer.shared_experts", dtype, tp, ops)
    sizes = config.hidden_size, integer(fields, "moe_intermediate_size"), integer(fields, "n_routed_experts")
    return Experts(*sizes, deepseek_routing(fields), _EXPERT_NAMES, dtype, tp, ops, shared, Gate("relu2"))


class NemotronHForCausalLM(LlamaForCausalLM):
    def __init__(self, config: ModelConfig, *args: Any, **parts: Any) -> None:
        super().__init__(config, *args, **parts)
        self.numbers = nemotron_layers(config.extra)
        for layer, numbers in zip(self.layers, self.numbers, strict=True):
            if numbers.mlp is None:
                layer.before_mlp = NoNorm()

    @property
    def ends_of_layers(self) -> list[int]:
        """Of each layer, the checkpoint's last one that is a part of it."""
        return [layer.mixer if layer.mlp is None else layer.mlp for layer in self.numbers]

    def weights(self) -> WeightSpecs:
        """By transformers' names, and by those of released checkpoints."""
        for name, spec in self._by_own_names():
            yield name, spec
            if name.startswith("model."):
                yield name.replace("model.", "backbone.", 1), spec._replace(instead_of=spec.instead_of or (name,))

    def _by_own_names(self) -> WeightSpecs:
        yield from self.embed_tokens.weights("model.embeddings")
        layers: list[Any] = list(self.layers)
        for layer, numbers in zip(layers, self.numbers, strict=True):
            mixer, mlp = (f"model.layers.{number}" for number in (numbers.mixer, numbers.mlp))
            yield from layer.self_attn.weights(f"{mixer}.mixer")
            yield from layer.before_attention.weights(f"{mixer}.norm")
            if numbers.mlp is not None:
                yield from layer.mlp.weights(f"{mlp}.{'mlp' if numbers.has_experts else 'mixer'}")
                yield from layer.before_mlp.weights(f"{mlp}.norm")
        yield from self.norm.weights("model.norm_f")  # type: ignore[operator]
        yield from self.lm_head.weights("lm_head")
