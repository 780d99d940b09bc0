"""DFlash: a few decoder layers that guess a whole block of tokens at once, as masks that see each other.

Owns the head and the names of its tensors in checkpoints of the `speculators` package. Its keys and values of known
positions come from what the target's layers said there, and nothing else of these positions is computed; the last token
and as many masks as are to be guessed attend to them and to each other, in both directions. Invariant: nothing of the
target is changed.
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
from nanovllm.layers.linear import Linear
from nanovllm.layers.norm import NoNorm
from nanovllm.layers.ops import Ops
from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.layers.weight_specs import WeightSpecs
from nanovllm.models.eagle3 import OF_TARGET, HiddenStateStore, check_aux_layers
from nanovllm.models.llama import DecoderLayer, rms_norm
from nanovllm.models.registry import read_model_config


@dataclass(frozen=True)
class DFlashConfig:
    """layers: as a model of the head's vocabulary. aux_layers: as in `Eagle3Config`. block_size: the last known token
    and the guessed ones together, at most.
    """

    layers: ModelConfig
    aux_layers: tuple[int, ...]
    block_size: int
    mask_token_id: int
    has_own_vocabulary: bool


def read_dflash_config(given: Mapping[str, Any], target: ModelConfig, name: str) -> DFlashConfig:
    """given: the checkpoint's config.json. ValueError or NotImplementedError for `name` if it is no such head."""
    kind, inner = given.get("speculators_model_type"), given.get("transformer_layer_config")
    if kind != "dflash" or not isinstance(inner, Mapping):
        raise ValueError(f"{name} is no DFlash head in the format of speculators: speculators_model_type is {kind!r}")
    if inner.get("model_type") != "qwen3":
        raise NotImplementedError(f"{name}: layers of the kind {inner.get('model_type')!r} are not supported")
    if given.get("sample_from_anchor"):
        raise NotImplementedError(f"{name}: sample_from_anchor is not supported")
    if given.get("mask_token_id") is None:
        raise ValueError(f"{name} names no mask_token_id")
    size = given.get("draft_vocab_size") or target.vocab_size
    fields = {"architectures": ["Qwen3ForCausalLM"], "vocab_size": size, "tie_word_embeddings": False}
    layers = read_model_config({**inner, **fields}, target.dtype)
    if layers.hidden_size != target.hidden_size:
        raise ValueError(f"{name} reads states of size {layers.hidden_size}, and the model's have {target.hidden_size}")
    aux = check_aux_layers(given.get("aux_hidden_state_layer_ids"), target, name)
    block_size = int(given.get("block_size", 8))
    return DFlashConfig(layers, aux, block_size, int(given["mask_token_id"]), size != target.vocab_size)


class DFlashHead(nn.Module):
    """Each rank of several holds the whole head. offsets: as in `Eagle3Head`."""

    def __init__(self, config: DFlashConfig, target: Any, max_len: int, dtype: torch.dtype, ops: Ops) -> None:
        """target: the model, whose embedding is read, and its head where the head has no vocabulary of its own."""
        super().__init__()
        layers, alone = config.layers, TensorParallel()
        self.fc = Linear(len(config.aux_layers) * layers.hidden_size, layers.hidden_size, False, dtype, ops)
        self.hidden_norm, self.norm = (rms_norm(layers, dtype, ops) for _ in range(2))
        self.layers = nn.ModuleList(DecoderLayer(layers, i, dtype, alone, ops) for i in range(layers.num_layers))
        self.lm_head = None
        if config.has_own_vocabulary:
            self.lm_head = LMHead(layers.vocab_size, layers.hidden_size, dtype, None, alone, ops)
        rope = layers.ropes[0]
        assert rope is not None, "Qwen3 rotates"
        self.rotary = RotaryEmbedding(layers.head_dim, max_len, rope)
        self.offsets: Tensor
        self.register_buffer("offsets", torch.zeros(layers.vocab_size, dtype=torch.int32), persistent=False)
        self._target = [target]  # not a part of it
        self._no_norm = NoNorm()
        self.store: HiddenStateStore | None = None  # once there is a cache

    def forward(self, input_ids: Tensor, positions: Tensor, is_known: Tensor, ctx: ForwardContext) -> Tensor:
        """Hidden states [num_tokens, hidden_size] after the last norm; those of known positions mean nothing.

        is_known [num_tokens]: is this a position whose states the store has? Else its token is read.
        """
        assert self.store is not None
        known = is_known[:, None]
        states, _ = self.hidden_norm(self.fc(self.store.states[ctx.groups[0].slot_mapping]))
        cos_sin = self.rotary(positions, None)
        x: Tensor = self._target[0].embed_tokens(input_ids)
        for layer in self.layers:
            normed, _ = layer.before_attention(x)  # type: ignore[operator]
            attended, _ = layer.self_attn(  # type: ignore[operator]
                self._no_norm, torch.where(known, states, normed), None, cos_sin, ctx
            )
            added, residual = layer.mlp(layer.before_mlp, attended, x)  # type: ignore[operator]
            x = added + residual
        hidden, _ = self.norm(x)
        return hidden  # type: ignore[no-any-return]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        head = self._target[0].lm_head if self.lm_head is None else self.lm_head
        logits: Tensor = head(hidden)
        return logits

    def weights(self) -> WeightSpecs:
        yield from self.fc.weights("fc")
        yield from self.hidden_norm.weights("hidden_norm")
        for i, layer in enumerate(self.layers):
            yield from layer.weights(f"layers.{i}")  # type: ignore[operator]
        yield from self.norm.weights("norm")
        if self.lm_head is not None:
            yield from self.lm_head.weights("lm_head")

    def weights_among(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors that are weights; `d2t` is taken on the way."""
        for name, tensor in tensors:
            if name == "d2t":
                self.offsets.copy_(tensor)
            elif name not in OF_TARGET and name != "t2d" and (self.lm_head is not None or name != "lm_head.weight"):
                yield name, tensor
