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
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.embedding import LMHead
from nanovllm.layers.linear import Linear
from nanovllm.layers.norm import NoNorm
from nanovllm.layers.ops import Ops
from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.layers.weight_specs import WeightSpecs
from nanovllm.model_config import ModelConfig
from nanovllm.models.draft_heads import DraftHead, read_speculators_config
from nanovllm.models.llama import DecoderLayer, rms_norm


@dataclass(frozen=True)
class DFlashConfig:
    """layers, aux_layers: as in `SpeculatorsConfig`. block_size: the last known token and the guessed ones together, at
    most.
    """

    layers: ModelConfig
    aux_layers: tuple[int, ...]
    block_size: int
    mask_token_id: int
    has_own_vocabulary: bool


def read_dflash_config(given: Mapping[str, Any], target: ModelConfig, name: str) -> DFlashConfig:
    """given: the checkpoint's config.json. ValueError or NotImplementedError for `name` if it is no such head."""
    layers, aux = read_speculators_config(
        given,
        target,
        name,
        kind="dflash",
        words="DFlash head",
        architectures={"qwen3": "Qwen3ForCausalLM"},
        off=("sample_from_anchor",),
        aux_field="aux_hidden_state_layer_ids",
        vocab_size=target.vocab_size,
    )
    if given.get("mask_token_id") is None:
        raise ValueError(f"{name} names no mask_token_id")
    block_size, has_own = int(given.get("block_size", 8)), layers.vocab_size != target.vocab_size
    return DFlashConfig(layers, aux, block_size, int(given["mask_token_id"]), has_own)


class DFlashHead(DraftHead):
    """Each rank of several holds the whole head."""

    def __init__(self, config: DFlashConfig, target: Any, max_len: int, dtype: torch.dtype, ops: Ops) -> None:
        """target: the model, whose embedding is read, and its head where the head has no vocabulary of its own."""
        layers, alone = config.layers, TensorParallel()
        super().__init__(layers.vocab_size)
        self.fc = Linear(len(config.aux_layers) * layers.hidden_size, layers.hidden_size, False, dtype, ops)
        self.hidden_norm, self.norm = (rms_norm(layers, dtype, ops) for _ in range(2))
        self.layers = nn.ModuleList(DecoderLayer(layers, i, dtype, alone, ops) for i in range(layers.num_layers))
        self.lm_head = None
        if config.has_own_vocabulary:
            self.lm_head = LMHead(layers.vocab_size, layers.hidden_size, dtype, None, alone, ops)
        rope = layers.ropes[0]
        assert rope is not None, "Qwen3 rotates"
        self.rotary = RotaryEmbedding(layers.head_dim, max_len, rope)
        self._target = [target]  # not a part of it
        self._no_norm = NoNorm()

    def forward(self, input_ids: Tensor, positions: Tensor, is_known: Tensor, ctx: ForwardContext) -> Tensor:
        """Hidden states [num_tokens, hidden_size] after the last norm; those of known positions mean nothing.

        is_known [num_tokens]: is this a position whose states the store has? Else its token is read.
        """
        known = is_known[:, None]
        states, _ = self.hidden_norm(self.fc(self.states_at(ctx)))
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
        for name, tensor in super().weights_among(tensors):
            if self.lm_head is not None or name != "lm_head.weight":
                yield name, tensor
