"""Places of a step that verifies drafts, in Triton.

Owns how they are prepared and accepted on a GPU: one program per place; the first place of a row accepts for all of
them. What a step that drafts does beside that has one program per row. Invariant: no program reads what another of the
same launch writes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.draft_places import Places, Unseen
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


@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "limits_ptr", "given_ptr"])
def _find_unseen_kernel(
    rows_ptr,
    limits_ptr,
    given_ptr,
    drawn_ptr,
    accepted_ptr,
    tokens_ptr,
    token_rows_ptr,
    rows_ahead_ptr,
    n,
    WIDTH: tl.constexpr,
    DRAWN: tl.constexpr,
    PLACES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    index = tl.program_id(0)
    row, limit = tl.load(rows_ptr + index), tl.load(limits_ptr + index)
    is_real = row >= 0
    accepted = tl.load(accepted_ptr + row, mask=is_real, other=0)
    is_told = tl.load(given_ptr + index * WIDTH + WIDTH - 1) >= 0
    for place in range(WIDTH):
        at = accepted - (WIDTH - 1 - place)
        remembered = tl.load(drawn_ptr + row * DRAWN + at, mask=is_real & (at >= 0), other=-1)
        token = tl.where(is_told, tl.load(given_ptr + index * WIDTH + place), remembered)
        token = tl.where(is_real, token, -1)
        tl.store(tokens_ptr + index * WIDTH + place, token)
        tl.store(token_rows_ptr + index * WIDTH + place, tl.where(token >= 0, row, -1))
    for ahead in range(PLACES):
        tl.store(rows_ahead_ptr + ahead * n + index, tl.where(ahead <= limit, row, -1))


@triton.jit(
    do_not_specialize_on_alignment=[
        "limits_ptr",
        "unseen_ptr",
        "rows_ptr",
        "offsets_ptr",
        "tokens_ptr",
        "following_ptr",
    ]
)
def _draft_places_kernel(
    rows_ahead_ptr,
    limits_ptr,
    unseen_ptr,
    drafts_ptr,
    vocabulary_ptr,
    rows_ptr,
    offsets_ptr,
    tokens_ptr,
    following_ptr,
    n,
    WIDTH: tl.constexpr,
    PLACES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    index = tl.program_id(0)
    limit = tl.load(limits_ptr + index)
    first = index * PLACES
    tl.store(tokens_ptr + first, tl.load(unseen_ptr + index * WIDTH + WIDTH - 1))
    for ahead in range(PLACES):
        tl.store(rows_ptr + first + ahead, tl.load(rows_ahead_ptr + ahead * n + index))
        tl.store(offsets_ptr + first + ahead, ahead)
        following = tl.zeros((), tl.int32) - 1
        if ahead < PLACES - 1:
            token = tl.load(drafts_ptr + ahead * n + index)
            if vocabulary_ptr is not None:
                token += tl.load(vocabulary_ptr + token)
            tl.store(tokens_ptr + first + ahead + 1, token)
            following = tl.where(ahead < limit, token, -1)
        tl.store(following_ptr + first + ahead, following)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def _note_drawn_kernel(
    words_ptr,
    rows_ptr,
    drawn_ptr,
    accepted_ptr,
    size,
    DRAWN: tl.constexpr,
    PLACES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    index = tl.program_id(0)
    row = tl.load(rows_ptr + index)
    if row >= 0:
        accepted = 0
        for place in range(PLACES):
            tl.store(drawn_ptr + row * DRAWN + place, tl.load(words_ptr + index * PLACES + place))
            accepted += place * tl.load(words_ptr + size + index * PLACES + place)
        tl.store(accepted_ptr + row, accepted)


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


def find_unseen_triton(
    rows: Tensor, limits: Tensor, given: Tensor, drawn: Tensor, accepted: Tensor, length: int
) -> Unseen:
    """See `draft_places.find_unseen`."""
    n, width = given.shape
    token_ids, token_rows = torch.empty_like(given), torch.empty_like(given)
    rows_ahead = rows.new_empty(1 + length, n)
    launch(
        _find_unseen_kernel, (n,), rows.device,
        rows, limits, given, drawn, accepted, token_ids, token_rows, rows_ahead, n,
        WIDTH=width, DRAWN=drawn.shape[1], PLACES=1 + length, num_warps=1,
    )  # fmt: skip
    return Unseen(rows, limits, token_ids, token_rows, rows_ahead)


def draft_places_triton(unseen: Unseen, drafts: Tensor, vocabulary: Tensor | None) -> Places:
    """See `draft_places.draft_places`."""
    length, n = drafts.shape
    places = Places(*drafts.new_empty(4, n * (1 + length)))
    launch(
        _draft_places_kernel, (n,), drafts.device,
        unseen.rows_ahead, unseen.limits, unseen.token_ids, drafts, vocabulary, *places, n,
        WIDTH=unseen.token_ids.shape[1], PLACES=1 + length, num_warps=1,
    )  # fmt: skip
    return places


def note_drawn_triton(words: Tensor, rows: Tensor, drawn: Tensor, accepted: Tensor) -> None:
    """See `draft_places.note_drawn`."""
    n, size = len(rows), words.shape[1]
    launch(
        _note_drawn_kernel, (n,), rows.device,
        words, rows, drawn, accepted, size, DRAWN=drawn.shape[1], PLACES=size // n, num_warps=1,
    )  # fmt: skip
