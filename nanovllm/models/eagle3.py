"""EAGLE-3: one decoder layer that guesses a model's next tokens from its hidden states (Li et al., arXiv 2503.01840).

Owns the head and the names of its tensors in checkpoints of the `speculators` package; how it goes on from token to
token is `draft_heads.py`'s. Invariant: nothing of the target is changed; its embedding is read, and states of three of
its layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nanovllm.attention.backend import ForwardContext
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.embedding import LMHead
from nanovllm.layers.linear import Linear, QKVParallelLinear
from nanovllm.layers.norm import NoNorm
from nanovllm.layers.ops import Ops
from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.layers.weight_specs import WeightSpecs
from nanovllm.model_config import ModelConfig
from nanovllm.models.draft_heads import SteppedHead, read_speculators_config
from nanovllm.models.llama import MLP, SelfAttention, rms_norm

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True)
class Eagle3Config:
    """layer: its decoder layer, with the head's vocabulary. aux_layers: as in `SpeculatorsConfig`."""

    layer: ModelConfig
    aux_layers: tuple[int, ...]
    norm_before_residual: bool
    norm_output: bool


def read_eagle3_config(given: Mapping[str, Any], target: ModelConfig, name: str) -> Eagle3Config:
    """given: the checkpoint's config.json. ValueError or NotImplementedError for `name` if it is no such head."""
    layer, aux = read_speculators_config(
        given,
        target,
        name,
        kind="eagle3",
        words="EAGLE-3 head",
        architectures=_ARCHITECTURES,
        off=("norm_before_fc", "fc_norm"),  # variants of the states' way in
        aux_field="eagle_aux_hidden_state_layer_ids",
        vocab_size=None,
    )
    if layer.num_layers != 1:
        raise NotImplementedError(f"{name} has {layer.num_layers} layers; heads of one are supported")
    options = {switch: bool(given.get(switch)) for switch in ("norm_before_residual", "norm_output")}
    return Eagle3Config(layer, aux, **options)


class _FirstAttention(SelfAttention):
    """Of an input that is twice as wide: the token's embedding beside the states."""

    def __init__(self, config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        super().__init__(config, layer_idx, dtype, tp, ops)
        heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv_proj = QKVParallelLinear(
            2 * config.hidden_size, size, heads, kv_heads, config.qkv_bias, dtype, tp, ops
        )


class _Layer(nn.Module):
    def __init__(self, config: Eagle3Config, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        super().__init__()
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = (
            rms_norm(config.layer, dtype, ops) for _ in range(3)
        )
        self.self_attn = _FirstAttention(config.layer, 0, dtype, tp, ops)
        self.mlp = MLP(config.layer, 0, dtype, tp, ops)
        self._no_norm = NoNorm()
        self._norm_before_residual = config.norm_before_residual

    def forward(self, embedded: Tensor, states: Tensor, cos_sin: Tensor | None, ctx: ForwardContext) -> Tensor:
        normed, _ = self.hidden_norm(states)
        residual = normed if self._norm_before_residual else states
        both = torch.cat((self.input_layernorm(embedded)[0], normed), dim=-1)
        x, _ = self.self_attn(self._no_norm, both, None, cos_sin, ctx)
        x, residual = self.mlp(self.post_attention_layernorm, x, residual)
        return x + residual

    def weights(self, name: str) -> WeightSpecs:
        yield from self.self_attn.weights(f"{name}.self_attn")
        yield from self.mlp.weights(f"{name}.mlp")
        for norm in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
            yield from getattr(self, norm).weights(f"{name}.{norm}")


class Eagle3Head(SteppedHead):
    """Each rank of several holds the whole head."""

    def __init__(
        self, config: Eagle3Config, embed: nn.Module, max_len: int, max_num_seqs: int, dtype: torch.dtype, ops: Ops
    ) -> None:
        """embed: the target's embedding."""
        layer, alone = config.layer, TensorParallel()
        super().__init__(embed, layer.vocab_size, layer.hidden_size, max_num_seqs, dtype, config.norm_output)
        num_aux = len(config.aux_layers)
        self.fc = Linear(num_aux * layer.hidden_size, layer.hidden_size, False, dtype, ops)
        self.layers = nn.ModuleList([_Layer(config, dtype, alone, ops)])
        self.norm = rms_norm(layer, dtype, ops)
        self.lm_head = LMHead(layer.vocab_size, layer.hidden_size, dtype, None, alone, ops)
        rope = layer.ropes[0]
        assert rope is not None, "Llama and Qwen3 rotate"
        self.rotary = RotaryEmbedding(layer.head_dim, max_len, rope)

    def given_states(self, states: Tensor) -> Tensor:
        return self.fc(states)  # type: ignore[no-any-return]

    def guess(self, embedded: Tensor, states: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        return self.layers[0](embedded, states, self.rotary(positions, None), ctx)  # type: ignore[no-any-return]

    def logits(self, normed: Tensor) -> Tensor:
        return self.lm_head(normed)  # type: ignore[no-any-return]

    def weights(self) -> WeightSpecs:
        yield from self.fc.weights("fc")
        yield from self.layers[0].weights("layers.0")  # type: ignore[operator]
        yield from self.norm.weights("norm")
        yield from self.lm_head.weights("lm_head")
