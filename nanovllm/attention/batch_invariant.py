"""BatchInvariantBackend: attention of each new token by itself, for `deterministic=True` on a CPU.

Owns the step's tokens as a batch of decodes: prompts, chunks of prompts and decodes all become one query with a length
and a block table of its own. Invariant: a token's output depends on its query and its context, to the bit: not on the
batch, nor on whether the token came in a prompt, in a chunk or alone. It costs the reuse of keys among the queries of a
prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend
from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.cpu.cpu_kernels import CpuKernels
from nanovllm.kernels.paged_attention import paged_attention_reference

DecodeAttention = Callable[[Tensor, LayerCache, AttentionMetadata, AttentionShape, Tensor | None], Tensor]


@dataclass(frozen=True)
class PreparedStep:
    """By number of tokens, the batch in which each is a decode: worked out once for all layers."""

    meta: AttentionMetadata
    decodes: dict[int, AttentionMetadata] = field(default_factory=dict)


class BatchInvariantBackend(AttentionBackend):
    def __init__(self, decode_attention: DecodeAttention) -> None:
        """decode_attention: attention of one token a request; a row depends on that request alone."""
        self._decode_attention = decode_attention

    def prepare(self, meta: AttentionMetadata) -> PreparedStep:
        return PreparedStep(meta)

    def forward(
        self, shape: AttentionShape, q: Tensor, cache: LayerCache, prepared: PreparedStep, sinks: Tensor | None = None
    ) -> Tensor:
        num_tokens = q.shape[0]
        if num_tokens not in prepared.decodes:
            prepared.decodes[num_tokens] = _as_decodes(prepared.meta, num_tokens)
        return self._decode_attention(q, cache, prepared.decodes[num_tokens], shape, sinks)


def _as_decodes(meta: AttentionMetadata, num_tokens: int) -> AttentionMetadata:
    """A request for each token; padding has no length. Waits for nothing, so it can be captured."""
    starts = meta.query_start_loc
    query_lens = starts[1:] - starts[:-1]
    request = torch.repeat_interleave(query_lens, output_size=num_tokens)
    place = torch.arange(num_tokens, dtype=torch.int32, device=starts.device) - starts[request]
    seq_lens = (meta.seq_lens - query_lens)[request] + place + 1
    lens = zip(meta.query_lens_host, meta.seq_lens_host, strict=True)
    return replace(
        meta,
        query_start_loc=torch.arange(num_tokens + 1, dtype=torch.int32, device=starts.device),
        seq_lens=seq_lens.clamp(min=0).int(),
        block_table=meta.block_table[request].contiguous(),
        num_decodes=num_tokens,
        num_reqs=num_tokens,
        max_query_len=1,
        query_lens_host=[1] * num_tokens,
        seq_lens_host=[n for query_len, seq_len in lens for n in range(seq_len - query_len + 1, seq_len + 1)],
    )


def cpp_or_reference(native: CpuKernels | None) -> DecodeAttention:
    """The C++ kernel where it applies, else one request at a time in plain PyTorch: right, and slow."""

    def decode_attention(
        q: Tensor, cache: LayerCache, meta: AttentionMetadata, shape: AttentionShape, sinks: Tensor | None = None
    ) -> Tensor:
        if native is not None:
            out = native.decode_attention(q, cache, meta.block_table, meta.seq_lens, shape, sinks)
            if out is not None:
                return out
        return paged_attention_reference(q, cache, meta, shape, sinks)

    return decode_attention
