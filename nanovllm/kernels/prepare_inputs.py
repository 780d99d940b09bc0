"""Inputs of a step from its rows: token ids, positions, slot mapping, block tables, built where the state lives.

Owns the meaning, in plain PyTorch; the GPU runs it as one kernel. Invariant: reads and advances `num_computed` of the
rows named, puts new blocks into their tables, and touches no other row; a padding row (-1) yields token 0 at position 0
without a slot, and a context of length 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.dispatch import use_triton


class StepInputs(NamedTuple):
    input_ids: Tensor  # [num_tokens] int32
    positions: Tensor  # [num_tokens] int32
    slot_mapping: Tensor  # [num_tokens] int64, -1 for padding
    seq_lens: Tensor  # [num_reqs] int32, context including this step
    block_table: Tensor  # [num_reqs, num_blocks] int32; behind the blocks of a request's context stands anything


def prepare_inputs(
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
    """rows [num_reqs], query_start_loc [num_reqs + 1], token_ids [num_tokens] (-1: take the row's last sampled token).

    Per row: last_token and num_computed [max_num_seqs] (advanced in place), block_tables [max_num_seqs, max_blocks].
    All int32. num_blocks: width of the step's own table, enough for the longest context. new_blocks [num_reqs]: the
    block that the request's first new token opens; -1: that token's block is in the table already, as it is in padding.
    """
    if use_triton(rows):
        from nanovllm.kernels.triton.prepare_inputs import prepare_inputs_triton

        prepare = prepare_inputs_triton
    else:
        prepare = prepare_inputs_reference
    return prepare(
        rows, query_start_loc, token_ids, last_token, num_computed, block_tables, block_size, num_blocks, new_blocks
    )


def prepare_inputs_reference(
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
    num_tokens = token_ids.shape[0]
    is_real = rows >= 0
    safe_rows = rows.clamp(min=0)
    if new_blocks is not None:
        opens = new_blocks >= 0
        opening = rows[opens]
        block_tables[opening, num_computed[opening] // block_size] = new_blocks[opens]
    query_lens = query_start_loc[1:] - query_start_loc[:-1]
    request = torch.repeat_interleave(query_lens, output_size=num_tokens)  # [num_tokens], index into rows
    row = safe_rows[request]
    token_is_real = is_real[request]
    offset = torch.arange(num_tokens, dtype=torch.int32, device=rows.device) - query_start_loc[request]
    positions = torch.where(token_is_real, num_computed[row] + offset, 0)
    input_ids = torch.where(token_ids < 0, last_token[row], token_ids)
    block_ids = block_tables[row, positions // block_size].long()
    slots = torch.where(token_is_real, block_ids * block_size + positions % block_size, -1)
    seq_lens = torch.where(is_real, num_computed[safe_rows] + query_lens, 0)
    num_computed.index_add_(0, safe_rows, torch.where(is_real, query_lens, 0))
    block_table = block_tables[:, :num_blocks].index_select(0, safe_rows)
    return StepInputs(torch.where(token_is_real, input_ids, 0), positions, slots, seq_lens, block_table)
