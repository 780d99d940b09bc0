"""LatentBackend: what a backend of latent attention may do beside `forward`.

Owns the interface, and which steps it is for. Invariant: a model that asks for nothing of it is right.

Over latents a pair of query and key costs 576 + 512 multiplications a head, and 192 + 128 with keys and values that are
made for each head. These cost one product for all of a step's tokens, in the place of two (`layers/absorbed.py`); but
what was computed in earlier steps would have to be made again each time, and somewhere. So they are made for prompts
that begin in a step.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from nanovllm.attention.backend import AttentionBackend
from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, HeadInputs, LayerCache


class LatentBackend(AttentionBackend):
    def forward_few(
        self, shape: AttentionShape, q: Tensor, q_rope: Tensor, kv: Tensor, heads: HeadInputs, matrix: Tensor,
        is_neox_style: bool, cache: LayerCache, prepared: Any,
    ) -> Tensor | None:  # fmt: skip
        """All between the products of a layer, in fewer kernels: `latent_store`, `forward`, and the two products of
        `layers/absorbed.py` with its matrix [num_heads, key_dim + value_dim, rank]; None, and nothing done, where they
        are apart. q, q_rope: parts of one tensor. Returns [num_tokens, num_heads * value_dim]."""
        return None

    def whole_from(self, prepared: Any) -> int | None:
        """The step's token from which on there are whole prompts alone, which `forward_whole` computes sooner, and then
        `forward` is for those before it; None if that is not so."""
        return None

    def forward_whole(
        self, q: Tensor, q_rope: Tensor, kv: Tensor, k_rope: Tensor, scale: float, prepared: Any
    ) -> Tensor:
        """q [num_tokens, num_heads, key_dim] and q_rope [num_tokens, num_heads, rope_dim] with k_rope [num_tokens,
        rope_dim]; kv [num_tokens, num_heads, key_dim + value_dim] -> [num_tokens, num_heads, value_dim]. These are the
        tokens from `whole_from` on."""
        raise NotImplementedError


@dataclass(frozen=True)
class LatentStep:
    """A part of what a backend prepares. meta: the step."""

    meta: AttentionMetadata

    @cached_property
    def whole_from(self) -> int | None:
        """By what the host knows: of a captured step, which may be replayed with others, it is no answer."""
        meta, first = self.meta, self.meta.num_decodes
        begins = meta.query_lens_host[first:] == meta.seq_lens_host[first:]
        return first if begins and meta.num_reqs > first else None

    @cached_property
    def decodes(self) -> AttentionMetadata:
        """The step without its prompts."""
        num = self.meta.num_decodes
        return replace(self.meta, num_reqs=num, query_lens_host=[1] * num, seq_lens_host=self.meta.seq_lens_host[:num])
