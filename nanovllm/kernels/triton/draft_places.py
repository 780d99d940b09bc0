"""Places of a step that verifies drafts, in Triton.

Owns how they are prepared and accepted on a GPU: one program per place; the first place of a row accepts for all of
them. Invariant: no program reads what another of the same launch writes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.draft_places import Places
from nanovllm.kernels.prepare_inputs import StepInputs
from nanovllm.kernels.triton.common.launch import launch

BLOCK = 512


@triton.jit(
    do_not_specialize=["table_stride", "num_blocks"],
    do_not_specialize_on_alignment=["rows_ptr", "offsets_ptr", "token_ids_ptr"],
)
def _prepare_places_kernel(
    rows_ptr,
    offsets_ptr,
    token_ids_ptr,
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
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + place).to(tl.int64)
    real = row >= 0
    table_ptr = tables_ptr + row * table_stride
    position = tl.load(num_computed_ptr + row, mask=real, other=0) + tl.load(offsets_ptr + place)
    position = tl.where(real, position, 0)
    block = tl.load(table_ptr + position // BLOCK_SIZE, mask=real, other=0).to(tl.int64)
    seq_len = tl.where(real, position + 1, 0)
    tl.store(input_ids_ptr + place, tl.where(real, tl.load(token_ids_ptr + place), 0))
    tl.store(positions_ptr + place, position)
    tl.store(slots_ptr + place, tl.where(real, block * BLOCK_SIZE + position % BLOCK_SIZE, -1))
    tl.store(seq_lens_ptr + place, seq_len)
    num_used = tl.cdiv(seq_len, BLOCK_SIZE)
    for start in range(0, num_used, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < num_used
        tl.store(block_table_ptr + place * num_blocks + index, tl.load(table_ptr + index, mask=mask), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "offsets_ptr", "drafts_ptr"])
def _accept_drafts_kernel(
    rows_ptr,
    offsets_ptr,
    drafts_ptr,
    tokens_ptr,
    num_computed_ptr,
    last_token_ptr,
    out_ptr,
    size,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    place = tl.program_id(0)
    row = tl.load(rows_ptr + place).to(tl.int64)
    tl.store(out_ptr + place, tl.load(tokens_ptr + place))
    if row < 0:
        tl.store(out_ptr + size + place, 0)
    elif tl.load(offsets_ptr + place) == 0:
        end = place
        token = tl.load(tokens_ptr + end)
        draft = tl.load(drafts_ptr + end)
        while token == draft:  # behind a row's last token there is no draft, so this ends
            tl.store(out_ptr + size + end, 0)
            end += 1
            token = tl.load(tokens_ptr + end)
            draft = tl.load(drafts_ptr + end)
        tl.store(out_ptr + size + end, 1)
        tl.store(num_computed_ptr + row, tl.load(num_computed_ptr + row) + end - place + 1)
        tl.store(last_token_ptr + row, token)
        while draft >= 0:
            end += 1
            draft = tl.load(drafts_ptr + end)
            tl.store(out_ptr + size + end, 0)


def prepare_places_triton(
    places: Places, num_computed: Tensor, block_tables: Tensor, block_size: int, num_blocks: int
) -> StepInputs:
    """See `draft_places.prepare_places`."""
    size, device = places.rows.shape[0], places.rows.device

    def room(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    inputs = StepInputs(
        input_ids=room(size),
        positions=room(size),
        slot_mapping=room(size, dtype=torch.int64),
        seq_lens=room(size),
        block_table=room(size, num_blocks),
    )
    launch(
        _prepare_places_kernel, (size,), device,
        places.rows, places.offsets, places.token_ids, num_computed, block_tables, block_tables.stride(0), *inputs,
        num_blocks, BLOCK_SIZE=block_size, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return inputs


def accept_drafts_triton(places: Places, tokens: Tensor, num_computed: Tensor, last_token: Tensor) -> Tensor:
    """See `draft_places.accept_drafts`."""
    size = tokens.shape[0]
    out = torch.empty(2, size, dtype=torch.int32, device=tokens.device)
    launch(
        _accept_drafts_kernel, (size,), tokens.device,
        places.rows, places.offsets, places.drafts, tokens, num_computed, last_token, out, size, num_warps=1,
    )  # fmt: skip
    return out
