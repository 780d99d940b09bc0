"""Inputs of a step from its rows, in Triton.

Owns how the inputs are built on a GPU: one program per request, which alone advances its row. Invariant: every read of
a row's `num_computed` comes before the program's own write to it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.prepare_inputs import StepInputs
from nanovllm.kernels.triton.common.launch import launch

BLOCK = 512


@triton.jit
def _blocks_at(table_ptr, place, mask, new_place, new_block):
    """Block ids at these places of a row's table, the new one among them before it is written."""
    block = tl.load(table_ptr + place, mask=mask, other=0)
    return tl.where((place == new_place) & (new_block >= 0), new_block, block)


@triton.jit(
    do_not_specialize=["table_stride", "num_blocks"],
    do_not_specialize_on_alignment=["rows_ptr", "query_start_ptr", "token_ids_ptr", "new_blocks_ptr"],
)
def _prepare_inputs_kernel(
    rows_ptr,
    query_start_ptr,
    token_ids_ptr,
    new_blocks_ptr,
    last_token_ptr,
    num_computed_ptr,
    tables_ptr,
    table_stride,
    input_ids_ptr,
    positions_ptr,
    slots_ptr,
    seq_lens_ptr,
    block_table_ptr,
    num_blocks,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    req = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + req).to(tl.int64)
    begin = tl.load(query_start_ptr + req)
    end = tl.load(query_start_ptr + req + 1)
    new_block = -1
    if new_blocks_ptr is not None:
        new_block = tl.load(new_blocks_ptr + req)
    real = row >= 0
    computed = tl.load(num_computed_ptr + row, mask=real, other=0)
    last_token = tl.load(last_token_ptr + row, mask=real, other=0)
    table_ptr = tables_ptr + row * table_stride
    new_place = computed // BLOCK_SIZE
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < end
        token = tl.load(token_ids_ptr + index, mask=mask & real, other=0)
        position = tl.where(real, computed + index - begin, 0)
        block = _blocks_at(table_ptr, position // BLOCK_SIZE, mask & real, new_place, new_block)
        slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        tl.store(input_ids_ptr + index, tl.where(token < 0, last_token, token), mask=mask)
        tl.store(positions_ptr + index, position, mask=mask)
        tl.store(slots_ptr + index, tl.where(real, slot, -1), mask=mask)
    seq_len = tl.where(real, computed + end - begin, 0)
    tl.store(seq_lens_ptr + req, seq_len)
    num_used = tl.cdiv(seq_len, BLOCK_SIZE)
    for start in range(0, num_used, BLOCK):
        place = start + tl.arange(0, BLOCK)
        mask = place < num_used
        block = _blocks_at(table_ptr, place, mask, new_place, new_block)
        tl.store(block_table_ptr + req * num_blocks + place, block, mask=mask)
    tl.debug_barrier()  # all threads have read what one of them writes now
    tl.store(num_computed_ptr + row, seq_len, mask=real)
    if new_blocks_ptr is not None:
        tl.store(table_ptr + new_place, new_block, mask=new_block >= 0)


def prepare_inputs_triton(
    rows: Tensor,
    query_start_loc: Tensor,
    token_ids: Tensor,
    last_token: Tensor,
    num_computed: Tensor,
    block_tables: Tensor,
    block_size: int,
    num_blocks: int,
    new_blocks: Tensor | None = None,
) -> StepInputs:
    """See `prepare_inputs.prepare_inputs`; no row is named twice."""
    num_reqs, num_tokens, device = rows.shape[0], token_ids.shape[0], rows.device

    def room(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    inputs = StepInputs(
        input_ids=room(num_tokens),
        positions=room(num_tokens),
        slot_mapping=room(num_tokens, dtype=torch.int64),
        seq_lens=room(num_reqs),
        block_table=room(num_reqs, num_blocks),
    )
    if num_reqs:
        launch(
            _prepare_inputs_kernel, (num_reqs,), device,
            rows, query_start_loc, token_ids, new_blocks, last_token, num_computed, block_tables,
            block_tables.stride(0), *inputs, num_blocks, BLOCK_SIZE=block_size, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return inputs
