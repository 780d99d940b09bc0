"""What heads that draft from a model's states have in common: where the states are noted, and how a head is called.

Owns the store of states, the beginning of a config in the format of the package `speculators`, and two kinds of heads:
any, and those that go on token after token, first from the target's states and then from their own. Invariant: nothing
of the target is changed; its states are noted where its keys are, by slot, whatever computes them.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nanovllm.attention.backend import ForwardContext
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.weight_specs import WeightSpecs
from nanovllm.model_config import ModelConfig
from nanovllm.models.registry import read_model_config

_OF_TARGET = ("embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight")  # which checkpoints may repeat


class SpeculatorsConfig(NamedTuple):
    """layers: as of a model with the head's vocabulary. aux_layers: of the target, the layers before which its states
    are read; as many as it has layers stands for its last norm's input.
    """

    layers: ModelConfig
    aux_layers: tuple[int, ...]


def read_speculators_config(
    given: Mapping[str, Any],
    target: ModelConfig,
    name: str,
    *,
    kind: str,
    words: str,
    architectures: Mapping[str, str],
    off: tuple[str, ...],
    aux_field: str,
    vocab_size: int | None,
) -> SpeculatorsConfig:
    """given: the checkpoint's config.json. kind, and in words: what it must be; architectures: by the model_type of its
    layers; off: switches that are not supported; vocab_size: of a head that names none, where it is not its layers'.
    Raises ValueError or NotImplementedError for `name` if it is not so.
    """
    found, inner = given.get("speculators_model_type"), given.get("transformer_layer_config")
    if found != kind or not isinstance(inner, Mapping):
        raise ValueError(f"{name} is no {words} in the format of speculators: speculators_model_type is {found!r}")
    architecture = architectures.get(str(inner.get("model_type")))
    if architecture is None:
        raise NotImplementedError(f"{name}: a layer of the kind {inner.get('model_type')!r} is not supported")
    for switch in off:
        if given.get(switch):
            raise NotImplementedError(f"{name}: {switch} is not supported")
    size = given.get("draft_vocab_size") or vocab_size or inner.get("vocab_size")
    fields = {"architectures": [architecture], "vocab_size": size, "tie_word_embeddings": False}
    layers = read_model_config({**inner, **fields}, target.dtype)
    if layers.hidden_size != target.hidden_size:
        raise ValueError(f"{name} reads states of size {layers.hidden_size}, and the model's have {target.hidden_size}")
    n = target.num_layers
    aux = given.get(aux_field) or [2, n // 2, n - 3]  # what is usual
    if len(set(aux)) != len(aux) or min(aux) < 0 or max(aux) > n:
        raise ValueError(f"{name} reads states before layers {aux}, and the model has {n}")
    return SpeculatorsConfig(layers, tuple(aux))


class HiddenStateStore:
    """What a target's layers said of each token: states [num_slots + 1, len(aux_layers) * hidden_size], by slot of its
    keys; the last row is padding's. Noted while the target runs, so in its CUDA graphs as well.
    """

    def __init__(self, target: Any, aux_layers: tuple[int, ...], states: Tensor) -> None:
        """states: zeros, of the dtype and on the device of the target's."""
        self.states, self._size = states, states.shape[1] // len(aux_layers)
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
        # Padding's slot is -1, and so its states go to the last row.
        self.states[ctx.groups[0].slot_mapping, columns] = x if residual is None else x + residual


class DraftHead(nn.Module):
    """offsets [vocab_size] int32: what is added to a token of the head's for the target's."""

    offsets: Tensor

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.zeros(vocab_size, dtype=torch.int32), persistent=False)
        self.store: HiddenStateStore | None = None  # once there is a cache

    def states_at(self, ctx: ForwardContext) -> Tensor:
        """The target's, of each of the step's tokens."""
        assert self.store is not None
        return self.store.states[ctx.groups[0].slot_mapping]

    def as_target(self, token_ids: Tensor) -> Tensor:
        """The target's ids of the head's tokens."""
        return token_ids + self.offsets[token_ids]

    def weights(self) -> WeightSpecs:
        raise NotImplementedError

    def weights_among(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors that are weights; `d2t` is taken on the way."""
        for name, tensor in tensors:
            if name == "d2t":
                self.offsets.copy_(tensor)
            elif name not in _OF_TARGET and name != "t2d":
                yield name, tensor


class SteppedHead(DraftHead):
    """As a model of this engine's runner, for the head's own vocabulary. At position i it reads the token at i + 1
    beside the states at i; so its answer is a guess of the token at i + 2.

    is_chained: of the step that runs, or is captured, whether its states are the head's own, of the step before.
    """

    norm: RMSNorm  # the last one
    own: Tensor  # the states of the step before

    def __init__(
        self,
        embed: nn.Module,
        vocab_size: int,
        hidden_size: int,
        max_num_seqs: int,
        dtype: torch.dtype,
        norms_own: bool,
    ) -> None:
        """embed: the target's embedding. norms_own: are the states that go on those behind the last norm?"""
        super().__init__(vocab_size)
        self.register_buffer("own", torch.zeros(max(max_num_seqs, 64), hidden_size, dtype=dtype), persistent=False)
        self._embed = [embed]  # not a part of it
        self._norms_own = norms_own
        self.is_chained = True

    def forward(self, input_ids: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        """Hidden states before the last norm; those that are asked for logits are the next step's."""
        if self.is_chained and len(input_ids) <= len(self.own):
            input_ids, states = self.as_target(input_ids), self.own[: len(input_ids)]
        else:
            states = self.given_states(self.states_at(ctx))
        return self.guess(self._embed[0](input_ids), states, positions, ctx)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        normed, _ = self.norm(hidden)
        num_kept = min(len(hidden), len(self.own))  # more rows come only while kernels are compiled
        self.own[:num_kept] = (normed if self._norms_own else hidden)[:num_kept]
        return self.logits(normed)

    def given_states(self, states: Tensor) -> Tensor:
        """The target's, as the head takes them in."""
        raise NotImplementedError

    def guess(self, embedded: Tensor, states: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        """Hidden states before the last norm."""
        raise NotImplementedError

    def logits(self, normed: Tensor) -> Tensor:
        raise NotImplementedError
