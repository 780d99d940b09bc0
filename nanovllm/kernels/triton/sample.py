"""Sampling in Triton: logits become tokens in two launches, for any mixture of greedy, sampled and filtered rows.

Owns the arithmetic of `sampling/sampler.py` from greedy or temperature on, by the same definitions; min_tokens is not
here. Invariant: a token depends on its own row alone, and every parameter is read on the device, so that a call can be
captured in a CUDA graph and replayed for other requests.

    stats    one program per row and a few groups of 128 tokens:   highest logit and weight of each group
    pick     one program per row:   [threshold of the filters]  ->  group by running weight  ->  token inside it

A weight is exp((logit - highest) / temperature). The three filters amount to one threshold on the logits, and to how
many of the tokens that are exactly at it stay, lowest ids first. min_p gives a threshold at once. Those of top_k (the
lowest with at least k tokens at or above it, when seen from above) and of top_p (the same with a weight) are searched
for (`filter_threshold.py`). There is no sort, and no pass at all for rows that do not ask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2
from nanovllm.kernels.triton.filter_threshold import (
    GROUP,
    as_key,
    as_number,
    bound_by_count,
    bound_by_weight,
    search_threshold,
    weigh_listed,
)

LOG2_E = tl.constexpr(1.4426950408889634)
FEW_ROWS = 8  # up to so many rows, smaller programs keep every multiprocessor busy
SEARCH_GROUPS = 64  # groups weighed at a time in a search
PICK_WARPS = 16
PICK_REGISTERS = 64  # per thread: two programs on a multiprocessor
MANY = tl.constexpr(1 << 30)
UNKNOWN_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # low bits of a float32 that are always 0

# Where a row of `DrawColumns.columns` holds what, in 4-byte words.
SEED_LOW, SEED_HIGH = tl.constexpr(0), tl.constexpr(1)
TEMPERATURE, MIN_P, TOP_P, TOP_K = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)


@triton.jit
def _column(columns_ptr, row, columns_stride, COLUMN: tl.constexpr):
    return tl.load(columns_ptr + row.to(tl.int64) * columns_stride + COLUMN)


@triton.jit
def _float_column(columns_ptr, row, columns_stride, COLUMN: tl.constexpr):
    return _column(columns_ptr, row, columns_stride, COLUMN).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def _stats_kernel(
    logits_ptr,
    logits_stride,
    rows_ptr,
    columns_ptr,
    columns_stride,
    tops_ptr,
    weights_ptr,
    vocab_size,
    num_groups,
    NUM_GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    index = tl.program_id(1)
    row = tl.load(rows_ptr + index)
    if row >= 0:
        temperature = _float_column(columns_ptr, row, columns_stride, TEMPERATURE)
        group = tl.program_id(0) * NUM_GROUPS + tl.arange(0, NUM_GROUPS)
        token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x_ptr = logits_ptr + index.to(tl.int64) * logits_stride + token
        x = tl.load(x_ptr, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
        top = tl.max(x, axis=1)
        place = index.to(tl.int64) * num_groups + group
        tl.store(tops_ptr + place, top, mask=group < num_groups)
        if temperature > 0:
            base = tl.where(top == float("-inf"), 0.0, top)
            weight = tl.exp2((x - base[:, None]) * (LOG2_E / temperature))
            tl.store(weights_ptr + place, tl.sum(weight, axis=1), mask=group < num_groups)


@triton.jit
def _uniform(columns_ptr, row, columns_stride, position):
    """As `sampling/philox.py`: [0, 1) in steps of 2**-24."""
    low = _column(columns_ptr, row, columns_stride, SEED_LOW).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = _column(columns_ptr, row, columns_stride, SEED_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
    word, _, _, _ = tl.philox(low | (high << 32), position, 0, 0, 0)
    return (word >> 8).to(tl.float32) * (1.0 / (1 << 24))


@triton.jit
def _first_above(reached, weight, target):
    """The first place of positive weight whose running weight exceeds the target; rounding may leave none: the last."""
    place = tl.arange(0, weight.shape[0])
    first = tl.min(tl.where((reached > target) & (weight > 0), place, MANY), axis=0)
    last = tl.max(tl.where(weight > 0, place, 0), axis=0)
    return tl.minimum(first, last)


@triton.jit
def _at(values, place):
    """values[place]"""
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == place, values, 0), axis=0)


@triton.jit
def _store_token(tokens_ptr, index, last_token_ptr, row, token):
    tl.store(tokens_ptr + index, token)
    tl.store(last_token_ptr + row, token)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "positions_ptr"])
def _pick_kernel(
    logits_ptr,
    logits_stride,
    rows_ptr,
    positions_ptr,
    columns_ptr,
    columns_stride,
    tops_ptr,
    weights_ptr,
    list_ptr,
    ties_ptr,
    tokens_ptr,
    last_token_ptr,
    vocab_size,
    num_groups,
    MAX_GROUPS: tl.constexpr,
    SEARCH_GROUPS: tl.constexpr,
    UNKNOWN: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    index = tl.program_id(0)
    row = tl.load(rows_ptr + index)
    if row < 0:
        tl.store(tokens_ptr + index, 0)
        return
    temperature = _float_column(columns_ptr, row, columns_stride, TEMPERATURE)
    x_ptr = logits_ptr + index.to(tl.int64) * logits_stride
    place = index.to(tl.int64) * num_groups
    tops_ptr, weights_ptr = tops_ptr + place, weights_ptr + place
    list_ptr, ties_ptr = list_ptr + place, ties_ptr + place
    group = tl.arange(0, MAX_GROUPS)
    tops = tl.load(tops_ptr + group, mask=group < num_groups, other=float("-inf"))
    highest = tl.max(tops, axis=0)
    in_group = tl.arange(0, GROUP)

    if (temperature == 0) | ~(tl.abs(highest) < float("inf")):
        first = tl.min(tl.where(tops == highest, group, num_groups - 1), axis=0)
        token = first * GROUP + in_group
        x = tl.load(x_ptr + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
        picked = tl.min(tl.where((x == highest) & (token < vocab_size), token, vocab_size - 1), axis=0)
        _store_token(tokens_ptr, index, last_token_ptr, row, picked)
        return

    scale = LOG2_E / temperature
    min_p = _float_column(columns_ptr, row, columns_stride, MIN_P)
    top_p = _float_column(columns_ptr, row, columns_stride, TOP_P)
    top_k = _column(columns_ptr, row, columns_stride, TOP_K)
    weights = tl.load(weights_ptr + group, mask=group < num_groups, other=0.0)
    weights *= tl.exp2((tops - highest) * scale)
    threshold = highest * 0 + float("-inf")
    tie_weight = 0.0
    max_ties = tl.full([], MANY, tl.int32)
    group_weights = weights.to(tl.float64)
    ties_before = tl.zeros([MAX_GROUPS], tl.int32)
    if (min_p > 0) | (top_k > 0) | (top_p < 1):
        if min_p > 0:
            threshold = highest + tl.log2(min_p) / scale
        if top_k > 0:
            low = bound_by_count(tops, highest, top_k, UNKNOWN)
            low, _ = search_threshold(
                x_ptr, list_ptr, tops, low, threshold, highest, scale, top_k.to(tl.float64), 0.0, vocab_size,
                num_groups, True, SEARCH_GROUPS, UNKNOWN,
            )  # fmt: skip
            threshold = tl.maximum(threshold, as_number(low, UNKNOWN))
        wanted = tl.full([], -1.0, tl.float64)
        if top_p < 1:
            low = as_key(threshold, UNKNOWN)
            if threshold == float("-inf"):
                total = tl.sum(group_weights, axis=0)
                wanted = total * top_p
                spare = (total - wanted - 1e-5 * total).to(tl.float32)
                low = bound_by_weight(tops, weights, highest, scale, spare, UNKNOWN)
            low, wanted = search_threshold(
                x_ptr, list_ptr, tops, low, threshold, highest, scale, wanted, top_p, vocab_size,
                num_groups, False, SEARCH_GROUPS, UNKNOWN,
            )  # fmt: skip
            threshold = tl.maximum(threshold, as_number(low, UNKNOWN))
        weigh_listed(
            x_ptr, list_ptr, weights_ptr, ties_ptr, tops, threshold, highest, scale, vocab_size, num_groups,
            SEARCH_GROUPS,
        )  # fmt: skip
        listed = (tops >= threshold) & (group < num_groups)
        group_weights = tl.load(weights_ptr + group, mask=listed, other=0.0).to(tl.float64)
        ties = tl.load(ties_ptr + group, mask=listed, other=0)
        ties_before = tl.cumsum(ties, axis=0) - ties
        tie_weight = tl.exp2((threshold - highest) * scale)
        if (top_p < 1) & (tie_weight > 0):
            missing = (wanted - tl.sum(group_weights, axis=0)) / tie_weight
            max_ties = tl.ceil(tl.minimum(tl.maximum(missing, 1.0), vocab_size)).to(tl.int32)
        group_weights += tie_weight * tl.minimum(tl.maximum(max_ties - ties_before, 0), ties).to(tl.float64)

    reached = tl.cumsum(group_weights, axis=0)
    position = tl.load(positions_ptr + index).to(tl.int32)
    uniform = _uniform(columns_ptr, row, columns_stride, position).to(tl.float64)
    target = tl.sum(group_weights, axis=0) * uniform
    chosen = _first_above(reached, group_weights, target)
    target -= _at(reached - group_weights, chosen)

    token = chosen * GROUP + in_group
    x = tl.load(x_ptr + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    is_tie = (x == threshold).to(tl.int32)
    rank = tl.cumsum(is_tie, axis=0) - is_tie + _at(ties_before, chosen)
    kept = (x > threshold) | ((is_tie > 0) & (rank < max_ties))
    weight = tl.where(kept, tl.exp2((x - highest) * scale), 0.0).to(tl.float64)
    picked = chosen * GROUP + _first_above(tl.cumsum(weight, axis=0), weight, target)
    _store_token(tokens_ptr, index, last_token_ptr, row, tl.minimum(picked, vocab_size - 1))


def sample_triton(
    logits: Tensor,
    rows: Tensor,
    positions: Tensor,
    columns: Tensor,
    last_token: Tensor,
    is_deterministic: bool = False,
) -> Tensor:
    """The next token of each request, int32 [n].

    logits [n, V] float32, float16 or bfloat16, its last dimension contiguous; rows, positions [n] int32: whose logits
    these are and where the new token will stand. columns, last_token: those of `DrawColumns`; each row's new token is
    written to the latter. A row of -1 is padding: token 0, and its logits are not read. is_deterministic: add weights
    in the same order for any number of rows.
    """
    num_rows, vocab_size = logits.shape
    num_groups = cdiv(vocab_size, GROUP.value)
    tokens = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows == 0:
        return tokens
    # Each by itself, so that all are aligned alike for any number of rows: another alignment is another kernel.
    tops, weights, listed, ties = (
        torch.empty(num_rows, num_groups, dtype=dtype, device=logits.device)
        for dtype in (torch.float32, torch.float32, torch.int32, torch.int32)
    )
    per_program = 8 if num_rows <= FEW_ROWS and not is_deterministic else 32
    launch(
        _stats_kernel, (cdiv(num_groups, per_program), num_rows), logits.device,
        logits, logits.stride(0), rows, columns, columns.stride(0), tops, weights, vocab_size, num_groups,
        NUM_GROUPS=per_program, num_warps=4,
    )  # fmt: skip
    launch(
        _pick_kernel, (num_rows,), logits.device,
        logits, logits.stride(0), rows, positions, columns, columns.stride(0), tops, weights, listed, ties, tokens,
        last_token, vocab_size, num_groups, MAX_GROUPS=next_power_of_2(num_groups),
        SEARCH_GROUPS=SEARCH_GROUPS, UNKNOWN=UNKNOWN_BITS[logits.dtype], num_warps=PICK_WARPS,
        maxnreg=PICK_REGISTERS,
    )  # fmt: skip
    return tokens
