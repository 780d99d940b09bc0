"""Multi-token prediction (MTP; DeepSeek-V3, arXiv 2412.19437): a decoder layer that was trained behind a model's last
one, and guesses the token after the next from the model's own states and the next token.

Owns the head and the names of its tensors, which lie in the model's own checkpoint: "mtp." in front in Qwen3-Next and
3.5, a layer behind the last one elsewhere. Invariant: nothing of the target is changed; its embedding, its last norm
and its head are the head's as well.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nanovllm.attention.backend import ForwardContext
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.linear import Linear
from nanovllm.layers.ops import Ops
from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.layers.weight_specs import WeightSpecs
from nanovllm.model_config import ModelConfig
from nanovllm.models.draft_heads import SteppedHead
from nanovllm.models.llama import DecoderLayer, rms_norm
from nanovllm.models.registry import model_class

# Fields by which a family says which of its layers are dense. The head's is none of these.
_DENSE_LAYERS: Mapping[str, Any] = {"first_k_dense_replace": 0, "mlp_only_layers": None, "decoder_sparse_step": 1}


@dataclass(frozen=True)
class MTPNames:
    """In the checkpoint: the decoder layer, the norms of the token's embedding and of the states, the projection of the
    two to one, and the last norm. norms_own: do states go on as they come from the last norm?
    """

    layer: str
    embedding_norm: str
    states_norm: str
    projection: str
    last_norm: str
    norms_own: bool


_QWEN = MTPNames(
    "mtp.layers.0", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm", norms_own=True
)
_NAMES = dict.fromkeys(("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"), _QWEN)


@dataclass(frozen=True)
class MTPConfig:
    """layer: its decoder layer, as a model of one. aux_layers: as in `SpeculatorsConfig`."""

    layer: ModelConfig
    aux_layers: tuple[int, ...]
    names: MTPNames


def read_mtp_config(given: Mapping[str, Any], target: ModelConfig, name: str) -> MTPConfig:
    """given: the model's config.json. Raises ValueError or NotImplementedError for `name` if it has no such head."""
    count, names = given.get("num_nextn_predict_layers"), _NAMES.get(target.architecture)
    if names is None:
        if not count:
            raise ValueError(f"{name} has no prediction head: its config.json names no num_nextn_predict_layers")
        behind = f"model.layers.{target.num_layers}"
        enorm, hnorm, projection, norm = (
            f"{behind}.{part}" for part in ("enorm", "hnorm", "eh_proj", "shared_head.norm")
        )
        names = MTPNames(behind, enorm, hnorm, projection, norm, norms_own=False)
    else:
        count = given.get("mtp_num_hidden_layers") or count or 1
    if count != 1:
        raise NotImplementedError(f"{name} has {count} prediction heads, one behind the other; models with one draft")
    if target.quantization is not None:
        raise NotImplementedError(
            f"{name} is quantized; a prediction head drafts in the dtypes of `LLM`'s option dtype"
        )
    at = next((i for i, window in enumerate(target.windows) if window is None), None)
    if at is None:
        raise NotImplementedError(f"{name} has no layer that attends to everything, as its prediction head does")
    layer = replace(
        target,
        num_layers=1,
        windows=(None,),
        ropes=(target.ropes[at],),
        state=None,
        extra={**target.extra, **{field: v for field, v in _DENSE_LAYERS.items() if field in target.extra}},
    )
    return MTPConfig(layer, (target.num_layers,), names)


class MTPHead(SteppedHead):
    """Its layer is shared by the ranks as those of the target are."""

    def __init__(
        self,
        config: MTPConfig,
        target: Any,
        max_len: int,
        max_num_seqs: int,
        dtype: torch.dtype,
        tp: TensorParallel,
        ops: Ops,
    ) -> None:
        """target: the model."""
        layer, self._names = config.layer, config.names
        hidden = layer.hidden_size
        super().__init__(
            target.embed_tokens, layer.vocab_size, hidden, max_num_seqs, dtype, norms_own=self._names.norms_own
        )
        self.projection = Linear(2 * hidden, hidden, False, dtype, ops)
        self.embedding_norm, self.states_norm, self.norm = (rms_norm(layer, dtype, ops) for _ in range(3))
        parts = getattr(model_class(layer.architecture), "keywords", {})
        self.layers = nn.ModuleList([DecoderLayer(layer, 0, dtype, tp, ops, **parts)])
        rope = layer.ropes[0]
        self.rotary = None if rope is None else RotaryEmbedding(layer.rope_dim, max_len, rope)
        self._target = [target]  # not a part of it

    def given_states(self, states: Tensor) -> Tensor:
        normed, _ = self._target[0].norm(states)
        return normed  # type: ignore[no-any-return]

    def guess(self, embedded: Tensor, states: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        if not self._names.norms_own:  # the family trains with zeros in the place of the second token
            embedded = embedded.masked_fill((positions == 0)[:, None], 0.0)
        both = torch.cat((self.embedding_norm(embedded)[0], self.states_norm(states)[0]), dim=-1)
        cos_sin = None if self.rotary is None else self.rotary(positions, None)
        x, residual = self.layers[0](self.projection(both), None, cos_sin, ctx)
        return x + residual  # type: ignore[no-any-return]

    def logits(self, normed: Tensor) -> Tensor:
        return self._target[0].compute_logits(normed)  # type: ignore[no-any-return]

    def weights(self) -> WeightSpecs:
        names = self._names
        yield from self.projection.weights(names.projection)
        yield from self.layers[0].weights(names.layer)  # type: ignore[operator]
        yield from self.embedding_norm.weights(names.embedding_norm)
        yield from self.states_norm.weights(names.states_norm)
        yield from self.norm.weights(names.last_norm)

    def weights_among(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        shared = {f"{self._names.layer}.{name}.weight" for name in ("embed_tokens", "shared_head.head")}
        return ((name, tensor) for name, tensor in tensors if name not in shared)
