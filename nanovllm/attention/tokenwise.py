"""TokenwiseBackend: attention of each new token by itself, for `deterministic=True`.

Owns the step's tokens as a batch of decodes: prompts, chunks of prompts and decodes all become one query with a length
and a block table of its own. Invariant: a token's output depends on its query and its context, to the bit: not on the
batch, nor on whether the token came in a prompt, in a chunk or alone. It costs the reuse of keys among the queries of a
prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend
from nanovllm.attention.metadata import AttentionMetadata
from nanovllm.kernels.native import NativeKernels
from nanovllm.kernels.paged_attention import paged_attention_reference

# (q, kv_cache, block_table [num_tokens, max_blocks], seq_lens [num_tokens] int32, scale, window, softcap) -> output
DecodeAttention = Callable[[Tensor, Tensor, Tensor, Tensor, float, int | None, float | None], Tensor]


@dataclass(frozen=True)
class PreparedStep:
    """By number of tokens, each token's block table and length: worked out once for all layers."""

    meta: AttentionMetadata
    tokens: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class TokenwiseBackend(AttentionBackend):
    def __init__(self, decode_attention: DecodeAttention) -> None:
        """decode_attention: attention of one token a request; a row depends on that request alone."""
        self._decode_attention = decode_attention

    def prepare(self, meta: AttentionMetadata) -> PreparedStep:
        return PreparedStep(meta)

    def forward(
        self,
        layer_idx: int,
        q: Tensor,
        kv_cache: Tensor,
        prepared: PreparedStep,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> Tensor:
        """q [num_tokens, num_heads, head_dim] -> the same shape."""
        num_tokens = q.shape[0]
        if num_tokens not in prepared.tokens:
            prepared.tokens[num_tokens] = _as_decodes(prepared.meta, num_tokens)
        block_table, seq_lens = prepared.tokens[num_tokens]
        return self._decode_attention(q, kv_cache, block_table, seq_lens, scale, window, softcap)


def _as_decodes(meta: AttentionMetadata, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Each token's block table and length; padding has no length. Waits for nothing, so it can be captured."""
    starts = meta.query_start_loc
    query_lens = starts[1:] - starts[:-1]
    request = torch.repeat_interleave(query_lens, output_size=num_tokens)
    place = torch.arange(num_tokens, dtype=torch.int32, device=starts.device) - starts[request]
    seq_lens = (meta.seq_lens - query_lens)[request] + place + 1
    return meta.block_table[request].contiguous(), seq_lens.clamp(min=0).int()


def native_or_reference(native: NativeKernels | None) -> DecodeAttention:
    """The C++ kernel where it applies, else one request at a time in plain PyTorch: right, and slow."""

    def decode_attention(
        q: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        if native is not None and softcap is None:
            out = native.decode_attention(q, kv_cache, block_table, seq_lens, scale, window)
            if out is not None:
                return out
        starts = torch.arange(len(q) + 1)
        batch = SimpleNamespace(query_start_loc=starts, seq_lens=seq_lens, block_table=block_table)
        return paged_attention_reference(q, kv_cache, batch, scale, window, softcap)

    return decode_attention
