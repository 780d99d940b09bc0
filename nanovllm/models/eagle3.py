"""EAGLE-3: one decoder layer that guesses a model's next tokens from its hidden states (Li et al., arXiv 2503.01840).

Owns the head and the names of its tensors in checkpoints of the `speculators` package. At position i it reads the token
at i + 1 and the states that the target had behind some of its layers at i; so its answer is a guess of the token at
i + 2. Further ahead there are no such states yet, and its own takes their place. Invariant: nothing of the target is
changed; its embedding is read, and its hidden states are noted where its keys are, by slot, whatever computes them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nanovllm.attention.backend import ForwardContext
from nanovllm.config import ModelConfig
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.embedding import LMHead
from nanovllm.layers.linear import Linear, QKVParallelLinear
from nanovllm.layers.norm import NoNorm
from nanovllm.layers.ops import Ops
from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.layers.weight_specs import WeightSpecs
from nanovllm.models.llama import MLP, SelfAttention, rms_norm
from nanovllm.models.registry import read_model_config

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_OFF = ("norm_before_fc", "fc_norm")  # variants of the states' way in
OF_TARGET = ("embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight")  # which checkpoints may repeat


@dataclass(frozen=True)
class Eagle3Config:
    """layer: its decoder layer, with the head's vocabulary. aux_layers: of the target, the layers before which its
    states are read; as many as it has layers stands for its last norm's input.
    """

    layer: ModelConfig
    aux_layers: tuple[int, ...]
    norm_before_residual: bool
    norm_output: bool


def read_eagle3_config(given: Mapping[str, Any], target: ModelConfig, name: str) -> Eagle3Config:
    """given: the checkpoint's config.json. ValueError or NotImplementedError for `name` if it is no such head."""
    kind, inner = given.get("speculators_model_type"), given.get("transformer_layer_config")
    if kind != "eagle3" or not isinstance(inner, Mapping):
        raise ValueError(f"{name} is no EAGLE-3 head in the format of speculators: speculators_model_type is {kind!r}")
    architecture = _ARCHITECTURES.get(str(inner.get("model_type")))
    if architecture is None:
        raise NotImplementedError(f"{name}: a layer of the kind {inner.get('model_type')!r} is not supported")
    for switch in _OFF:
        if given.get(switch):
            raise NotImplementedError(f"{name}: {switch} is not supported")
    draft_vocab_size = given.get("draft_vocab_size") or inner.get("vocab_size")
    layer = read_model_config(
        {**inner, "architectures": [architecture], "vocab_size": draft_vocab_size, "tie_word_embeddings": False},
        target.dtype,
    )
    if layer.num_layers != 1:
        raise NotImplementedError(f"{name} has {layer.num_layers} layers; heads of one are supported")
    if layer.hidden_size != target.hidden_size:
        raise ValueError(f"{name} reads states of size {layer.hidden_size}, and the model's have {target.hidden_size}")
    aux = check_aux_layers(given.get("eagle_aux_hidden_state_layer_ids"), target, name)
    options = {switch: bool(given.get(switch)) for switch in ("norm_before_residual", "norm_output")}
    return Eagle3Config(layer, aux, **options)


def check_aux_layers(given: Any, target: ModelConfig, name: str) -> tuple[int, ...]:
    """given: what the checkpoint names, or None for what is usual. Raises ValueError for layers that are not there."""
    n = target.num_layers
    aux = given or [2, n // 2, n - 3]
    if len(set(aux)) != len(aux) or min(aux) < 0 or max(aux) > n:
        raise ValueError(f"{name} reads states before layers {aux}, and the model has {n}")
    return tuple(aux)


class HiddenStateStore:
    """What a target's layers said of each token: states [num_slots + 1, len(aux_layers) * hidden_size], by slot of its
    keys; the last row is padding's. Noted while the target runs, so in its CUDA graphs as well.
    """

    def __init__(self, target: Any, aux_layers: tuple[int, ...], states: Tensor) -> None:
        """states: zeros, of the dtype and on the device of the target's."""
        self.states = states
        self._size, self._padding = states.shape[1] // len(aux_layers), states.shape[0] - 1
        for place, index in enumerate(aux_layers):
            columns = slice(place * self._size, (place + 1) * self._size)
            if index == len(target.layers):
                target.layers[-1].register_forward_hook(self._note_last(columns))
            else:
                target.layers[index].register_forward_pre_hook(self._note_first(columns))

    def _note_first(self, columns: slice) -> Any:
        return lambda layer, given: self._keep(columns, given[0], given[1], given[3])

    def _note_last(self, columns: slice) -> Any:
        return lambda layer, given, result: self._keep(columns, result[0], result[1], given[3])

    def _keep(self, columns: slice, x: Tensor, residual: Tensor | None, ctx: ForwardContext) -> None:
        slots = ctx.groups[0].slot_mapping
        states = x if residual is None else x + residual
        self.states[torch.where(slots < 0, self._padding, slots), columns] = states


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


class Eagle3Head(nn.Module):
    """As a model of this engine's runner, for the head's own vocabulary. Each rank of several holds the whole head.

    is_chained: of the step that runs, or is captured, whether its states are the head's own, of the step before.
    offsets [vocab_size] int32: what is added to a token of the head's for the target's.
    """

    def __init__(
        self, config: Eagle3Config, embed: nn.Module, max_len: int, max_num_seqs: int, dtype: torch.dtype, ops: Ops
    ) -> None:
        """embed: the target's embedding."""
        super().__init__()
        layer, alone = config.layer, TensorParallel()
        num_aux = len(config.aux_layers)
        self.fc = Linear(num_aux * layer.hidden_size, layer.hidden_size, False, dtype, ops)
        self.layers = nn.ModuleList([_Layer(config, dtype, alone, ops)])
        self.norm = rms_norm(layer, dtype, ops)
        self.lm_head = LMHead(layer.vocab_size, layer.hidden_size, dtype, None, alone, ops)
        rope = layer.ropes[0]
        assert rope is not None, "Llama and Qwen3 rotate"
        self.rotary = RotaryEmbedding(layer.head_dim, max_len, rope)
        self.offsets: Tensor
        self.own: Tensor  # the states of the step before
        self.register_buffer("offsets", torch.zeros(layer.vocab_size, dtype=torch.int32), persistent=False)
        self.register_buffer(
            "own", torch.zeros(max(max_num_seqs, 64), layer.hidden_size, dtype=dtype), persistent=False
        )
        self._embed = [embed]  # not a part of it
        self._norm_output = config.norm_output
        self.is_chained = True
        self.store: HiddenStateStore | None = None  # once there is a cache

    def forward(self, input_ids: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        """Hidden states before the last norm; those that are asked for logits are the next step's."""
        if self.is_chained and len(input_ids) <= len(self.own):
            input_ids, states = self.as_target(input_ids), self.own[: len(input_ids)]
        else:
            assert self.store is not None
            slots = ctx.groups[0].slot_mapping
            states = self.fc(self.store.states[slots])  # padding's -1 is the last row
        hidden: Tensor = self.layers[0](self._embed[0](input_ids), states, self.rotary(positions, None), ctx)
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        normed, _ = self.norm(hidden)
        num_kept = min(len(hidden), len(self.own))  # more rows come only while kernels are compiled
        self.own[:num_kept] = (normed if self._norm_output else hidden)[:num_kept]
        logits: Tensor = self.lm_head(normed)
        return logits

    def as_target(self, token_ids: Tensor) -> Tensor:
        """The target's ids of the head's tokens."""
        return token_ids + self.offsets[token_ids]

    def weights(self) -> WeightSpecs:
        yield from self.fc.weights("fc")
        yield from self.layers[0].weights("layers.0")  # type: ignore[operator]
        yield from self.norm.weights("norm")
        yield from self.lm_head.weights("lm_head")

    def weights_among(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors that are weights; `d2t` is taken on the way."""
        for name, tensor in tensors:
            if name == "d2t":
                self.offsets.copy_(tensor)
            elif name not in OF_TARGET and name != "t2d":
                yield name, tensor
