"""AttentionMetadata: the shape of one step's batch, as attention sees it.

Owns the description, computes nothing. Invariant: requests with exactly one query token come first, so a backend may
treat the first `num_decodes` rows alike. Host numbers are upper bounds of the device's, and exact on the CPU.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionMetadata:
    """One step. Tensors are int32 on the device, `slot_mapping` int64; T is the number of query tokens.

    query_start_loc [n + 1]: where each request's queries begin. seq_lens [n]: context including this step's tokens; 0
    for a row of padding. block_table [n, max_blocks]: block ids in context order. slot_mapping [T]: where each token's
    key and value go, -1 for padding.
    """

    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    num_decodes: int
    num_reqs: int
    max_query_len: int
    max_seq_len: int
    query_lens_host: list[int]
    seq_lens_host: list[int]
