"""Types of the attention contract: a layer's shape and KV cache, what norm and rotation need, a step's metadata.

Owns the four descriptions, computes nothing. Invariant: each is plain data, made once (shape, cache: with the model;
head inputs, metadata: each step) and read by every form of attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from nanovllm.kernels.cascade import CascadeInputs


class AttentionShape(NamedTuple):
    """One layer's attention, for the heads of this rank. num_heads is a multiple of num_kv_heads.

    scale: of the scores, positive. window: how many of the last keys a query sees, its own token's among them; None for
    all. softcap: a score s, times `scale`, becomes softcap * tanh(s / softcap) before the softmax. value_dim: values
    are the first so many numbers of the keys, of one KV head (`latent_store.py`); None where they are cached beside
    them.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    value_dim: int | None = None


class LayerCache(NamedTuple):
    """Keys and values of one layer: data [2, num_blocks, num_kv_heads, block_size, head_dim], with any strides; or keys
    alone, [1, ...], that hold the values (`AttentionShape.value_dim`).

    scales [num_blocks, num_kv_heads, block_size, 2] bfloat16: what a token's codes of key and of value are multiplied
    by when they are read, or those of the parts of a row of latents (`cache_codes.py`); contiguous. None where data are
    numbers.
    """

    data: Tensor
    scales: Tensor | None = None

    @property
    def num_blocks(self) -> int:
        return self.data.shape[1]

    @property
    def block_size(self) -> int:
        return self.data.shape[3]


class HeadInputs(NamedTuple):
    """What turns a row of the QKV product into queries, keys and values, beside that row: see `qkv_rope_store`.

    cos_sin [num_tokens, head_dim] float32, None for a layer without rotation; slot_mapping [num_tokens] integers; norm
    weights [head_dim], both None where the model has no such norm.
    """

    cos_sin: Tensor | None
    slot_mapping: Tensor
    q_norm_weight: Tensor | None = None
    k_norm_weight: Tensor | None = None
    eps: float = 0.0


@dataclass(frozen=True)
class AttentionMetadata:
    """One step's batch. Tensors are int32 on the device, `slot_mapping` int64; T is the number of query tokens.

    query_start_loc [n + 1]: where each request's queries begin. seq_lens [n]: context including this step's tokens; 0
    for a row of padding. block_table [n, max_blocks]: block ids in context order. slot_mapping [T]: where each token's
    key and value go, -1 for padding. cascade: prefixes that some of the decodes share; a backend may ignore it.
    reads_step: some of the decodes read keys that others of them store.

    Requests with exactly one query token come first, so a backend may treat the first `num_decodes` rows alike. Host
    numbers are upper bounds of the device's, and exact on the CPU.
    """

    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    num_decodes: int
    num_reqs: int
    max_query_len: int
    query_lens_host: Sequence[int]
    seq_lens_host: Sequence[int]
    cascade: CascadeInputs | None = None
    reads_step: bool = False
