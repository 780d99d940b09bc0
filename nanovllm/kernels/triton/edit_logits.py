"""Penalties and grammars on a GPU: a float32 copy of some rows' logits, edited on its way, in one launch.

Owns the arithmetic of `apply_penalties` and `apply_bitmask` in `sampling/stages/`, by the same definitions. Invariant:
each row is computed from that row alone, and what a row did not ask for is not read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2
from nanovllm.kernels.triton.sample import _float_column

PART = 4096  # tokens of a program

# Where a row of `DrawColumns.columns` holds what, in 4-byte words.
REPETITION, FREQUENCY, PRESENCE = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)


@triton.jit
def _is_allowed(words_ptr, words_stride, place, token, mask):
    """The token's bit in row `place` of the masks."""
    word = tl.load(words_ptr + place.to(tl.int64) * words_stride + token // 32, mask=mask, other=0)
    return ((word >> (token % 32)) & 1) != 0


@triton.jit(do_not_specialize=["has_penalties", "has_masks", "words_stride"])
def _edit_kernel(
    logits_ptr,
    logits_stride,
    members_ptr,
    rows_ptr,
    columns_ptr,
    columns_stride,
    counts_ptr,
    words_ptr,
    words_stride,
    places_ptr,
    left_ptr,
    out_ptr,
    vocab_size,
    num_parts,
    has_penalties,
    has_masks,
    PART: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    part, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = part * PART + tl.arange(0, PART)
    mask = token < vocab_size
    member = tl.load(members_ptr + index).to(tl.int64)
    x = tl.load(logits_ptr + member * logits_stride + token, mask=mask, other=float("-inf")).to(tl.float32)
    if has_penalties:
        row = tl.load(rows_ptr + index)
        repetition = _float_column(columns_ptr, row, columns_stride, REPETITION)
        frequency = _float_column(columns_ptr, row, columns_stride, FREQUENCY)
        presence = _float_column(columns_ptr, row, columns_stride, PRESENCE)
        if (repetition != 1) | (frequency != 0) | (presence != 0):
            count = tl.load(counts_ptr + row.to(tl.int64) * vocab_size + token, mask=mask, other=0)
            in_output = (count >> 1).to(tl.float32)
            x = tl.where(count > 0, x * tl.where(x > 0, 1 / repetition, repetition), x)
            x -= frequency * in_output + presence * tl.where(in_output > 0, 1.0, 0.0)
    if has_masks:
        place = tl.load(places_ptr + index)
        if place >= 0:
            x = tl.where(_is_allowed(words_ptr, words_stride, place, token, mask), x, float("-inf"))
            is_left = tl.max(x, axis=0) > float("-inf")
            tl.store(left_ptr + index * num_parts + part, is_left.to(tl.int32))
    tl.store(out_ptr + index * vocab_size + token, x, mask=mask)


@triton.jit(do_not_specialize=["words_stride"])
def _revive_kernel(
    words_ptr,
    words_stride,
    places_ptr,
    left_ptr,
    out_ptr,
    vocab_size,
    num_parts,
    MAX_PARTS: tl.constexpr,
    PART: tl.constexpr,
    PDL: tl.constexpr,
):
    """Where nothing is left of what the grammar allows, all of that is equally likely."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    index = tl.program_id(0).to(tl.int64)
    place = tl.load(places_ptr + index)
    if place >= 0:
        part = tl.arange(0, MAX_PARTS)
        left = tl.load(left_ptr + index * num_parts + part, mask=part < num_parts, other=0)
        if tl.sum(left, axis=0) == 0:
            for start in range(0, vocab_size, PART):
                token = start + tl.arange(0, PART)
                mask = token < vocab_size
                allowed = _is_allowed(words_ptr, words_stride, place, token, mask)
                tl.store(out_ptr + index * vocab_size + token, tl.where(allowed, 0.0, float("-inf")), mask=mask)


def edit_logits_triton(
    logits: Tensor,
    members: Tensor,
    rows: Tensor,
    columns: Tensor,
    counts: Tensor | None,
    words: Tensor | None,
    places: Tensor | None,
) -> Tensor:
    """Of logits [n, V] the rows `members` [m] int64, edited, float32 [m, V].

    logits float32, float16 or bfloat16, the last dimension contiguous. rows [m] int32: whose these are, in `columns` of
    `DrawColumns` and in `counts`, as `apply_penalties` has them; None: no penalties. words [g, >= ceil(V / 32)] int32,
    as `apply_bitmask` has them, and places [m] int32: which of these is a row's, -1 for a row without; None: no
    grammars.
    """
    num_rows, vocab_size = len(members), logits.shape[1]
    num_parts = cdiv(vocab_size, PART)
    out = torch.empty((num_rows, vocab_size), dtype=torch.float32, device=logits.device)
    if num_rows == 0:
        return out
    left = torch.empty((num_rows, num_parts), dtype=torch.int32, device=logits.device)
    # What nobody asked for is not read, so that there is one kernel for all: `rows` stands in its place.
    has_penalties, has_masks = counts is not None, words is not None
    counts, words, places = (rows if tensor is None else tensor for tensor in (counts, words, places))
    launch(
        _edit_kernel, (num_parts, num_rows), logits.device,
        logits, logits.stride(0), members, rows, columns, columns.stride(0), counts, words, words.stride(0), places,
        left, out, vocab_size, num_parts, int(has_penalties), int(has_masks),
        PART=PART, num_warps=8,
    )  # fmt: skip
    if has_masks:
        launch(
            _revive_kernel, (num_rows,), logits.device,
            words, words.stride(0), places, left, out, vocab_size, num_parts,
            MAX_PARTS=next_power_of_2(num_parts), PART=PART, num_warps=8,
        )  # fmt: skip
    return out
