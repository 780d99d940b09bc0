"""Random ragged batches over a paged cache, beside the unpaged keys and values they hold."""

from dataclasses import dataclass, replace

import torch

from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.cache_codes import CODES, encode

LAYOUTS = ("heads outside", "tokens outside", "k and v adjacent")


@dataclass(frozen=True)
class PagedCase:
    q: torch.Tensor  # [T, num_heads, head_dim]
    kv_cache: torch.Tensor  # [2, num_blocks, num_kv_heads, block_size, head_dim]
    meta: AttentionMetadata
    contexts: list[torch.Tensor]  # per request [2, num_kv_heads, seq_len, head_dim]
    scales: torch.Tensor | None = None

    @property
    def cache(self) -> LayerCache:
        return LayerCache(self.kv_cache, self.scales)

    def coded(self, kind: str | None) -> "PagedCase":
        """The same with a cache in codes; unwritten cells as well. kind: a kv_cache_dtype; None changes nothing."""
        if kind is None:
            return self
        codes, scales = encode(self.kv_cache, CODES[kind])
        return replace(self, kv_cache=codes.contiguous(), scales=scales.permute(1, 2, 3, 0).contiguous())

    def to(self, device: torch.device) -> "PagedCase":
        tensors = ("query_start_loc", "seq_lens", "block_table", "slot_mapping")
        meta = replace(self.meta, **{name: getattr(self.meta, name).to(device) for name in tensors})
        scales = None if self.scales is None else self.scales.to(device)
        return replace(self, q=self.q.to(device), kv_cache=self.kv_cache.to(device), meta=meta, scales=scales)

    def poison_unused(self) -> None:
        """NaN in every cell that holds no token of a request, as in blocks that were freed and poisoned."""
        block_size, device = self.kv_cache.shape[3], self.kv_cache.device
        used = torch.zeros(self.kv_cache.shape[1], block_size, dtype=torch.bool, device=device)
        for table, seq_len in zip(self.meta.block_table, self.meta.seq_lens.tolist(), strict=True):
            token = torch.arange(seq_len, device=device)
            used[table.long()[token // block_size], token % block_size] = True
        if self.scales is None:
            self.kv_cache.masked_fill_(~used[None, :, None, :, None], float("nan"))
        else:  # the largest code; NaN is none
            self.kv_cache.view(torch.int8).masked_fill_(~used[None, :, None, :, None], 126)
            self.scales.masked_fill_(~used[:, None, :, None], float("nan"))

    def shape(self, scale: float, window: int | None = None, softcap: float | None = None) -> AttentionShape:
        return AttentionShape(self.q.shape[1], self.kv_cache.shape[2], self.q.shape[2], scale, window, softcap)


def make_cache(
    layout: str, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
) -> torch.Tensor:
    """[2, num_blocks, num_kv_heads, block_size, head_dim] in one of three physical orders, with garbage in it."""
    if layout == "heads outside":
        return torch.randn(2, num_blocks, num_kv_heads, block_size, head_dim).to(dtype)
    if layout == "tokens outside":
        return torch.randn(2, num_blocks, block_size, num_kv_heads, head_dim).to(dtype).transpose(2, 3)
    return torch.randn(num_blocks, block_size, 2, num_kv_heads, head_dim).to(dtype).permute(2, 0, 3, 1, 4)


def make_metadata(
    query_lens: list[int], seq_lens: list[int], block_table: torch.Tensor, slot_mapping: torch.Tensor
) -> AttentionMetadata:
    """Metadata of a step on the CPU; requests with one query token must come first."""
    num_decodes = next((i for i, n in enumerate(query_lens) if n != 1), len(query_lens))
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    return AttentionMetadata(
        query_start_loc=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_table=block_table,
        slot_mapping=slot_mapping,
        num_decodes=num_decodes,
        num_reqs=len(query_lens),
        max_query_len=max(query_lens, default=0),
        query_lens_host=query_lens,
        seq_lens_host=seq_lens,
    )


def make_case(
    query_lens: list[int],
    seq_lens: list[int],
    *,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 8,
    dtype: torch.dtype = torch.float32,
    layout: str = "tokens outside",
    seed: int = 0,
) -> PagedCase:
    """Blocks are dealt in random order; unused table entries are 0, a block that may belong to another request."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        used = [-(-n // block_size) for n in seq_lens]
        num_blocks = sum(used) + 3
        free = torch.randperm(num_blocks).tolist()
        kv_cache = make_cache(layout, num_blocks, num_kv_heads, block_size, head_dim, dtype)
        block_table = torch.zeros(len(seq_lens), max(used, default=0) + 2, dtype=torch.int32)
        contexts, slots = [], []
        for i, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
            blocks = [free.pop() for _ in range(used[i])]
            block_table[i, : used[i]] = torch.tensor(blocks, dtype=torch.int32)
            context = torch.randn(2, num_kv_heads, seq_len, head_dim).to(dtype)
            for position in range(seq_len):
                kv_cache[:, blocks[position // block_size], :, position % block_size] = context[:, :, position]
            contexts.append(context)
            slots += [
                blocks[p // block_size] * block_size + p % block_size for p in range(seq_len - query_len, seq_len)
            ]
        q = torch.randn(sum(query_lens), num_heads, head_dim).to(dtype)
        meta = make_metadata(query_lens, seq_lens, block_table, torch.tensor(slots, dtype=torch.int64))
    return PagedCase(q, kv_cache, meta, contexts)
