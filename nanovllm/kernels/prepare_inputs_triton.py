"""Triton twin of `prepare_inputs.py`.

Owns how the inputs are built on a GPU: one program per request, which alone advances its row. Invariant: every read of
a row's `num_computed` comes before the program's own write to it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512


@triton.jit(do_not_specialize=["table_stride"])
def _prepare_inputs_kernel(
    rows_ptr,
    query_start_ptr,
    token_ids_ptr,
    last_token_ptr,
    num_computed_ptr,
    tables_ptr,
    table_stride,
    input_ids_ptr,
    positions_ptr,
    slots_ptr,
    seq_lens_ptr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    req = tl.program_id(0)
    row = tl.load(rows_ptr + req).to(tl.int64)
    begin = tl.load(query_start_ptr + req)
    end = tl.load(query_start_ptr + req + 1)
    real = row >= 0
    computed = tl.load(num_computed_ptr + row, mask=real, other=0)
    last_token = tl.load(last_token_ptr + row, mask=real, other=0)
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < end
        token = tl.load(token_ids_ptr + index, mask=mask & real, other=0)
        position = tl.where(real, computed + index - begin, 0)
        block = tl.load(tables_ptr + row * table_stride + position // BLOCK_SIZE, mask=mask & real, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        tl.store(input_ids_ptr + index, tl.where(token < 0, last_token, token), mask=mask)
        tl.store(positions_ptr + index, position, mask=mask)
        tl.store(slots_ptr + index, tl.where(real, slot, -1), mask=mask)
    seq_len = computed + end - begin
    tl.store(seq_lens_ptr + req, tl.where(real, seq_len, 0))
    tl.store(num_computed_ptr + row, seq_len, mask=real)


def prepare_inputs_triton(
    rows: Tensor,
    query_start_loc: Tensor,
    token_ids: Tensor,
    last_token: Tensor,
    num_computed: Tensor,
    block_tables: Tensor,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `prepare_inputs.prepare_inputs`; no row is named twice."""
    num_reqs, num_tokens, device = rows.shape[0], token_ids.shape[0], rows.device
    input_ids, positions = (torch.empty(num_tokens, dtype=torch.int32, device=device) for _ in range(2))
    slot_mapping = torch.empty(num_tokens, dtype=torch.int64, device=device)
    seq_lens = torch.empty(num_reqs, dtype=torch.int32, device=device)
    if num_reqs:
        _prepare_inputs_kernel[(num_reqs,)](
            rows, query_start_loc, token_ids, last_token, num_computed, block_tables, block_tables.stride(0),
            input_ids, positions, slot_mapping, seq_lens, BLOCK_SIZE=block_size, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return input_ids, positions, slot_mapping, seq_lens
