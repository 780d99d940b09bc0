"""Threshold of the sampling filters (top-k, top-p) in Triton, found without a sort.

Owns the search for the lowest logit that a filter keeps, among the numbers that the logits' type can hold, and what a
row weighs above it; `sample.py` says what for. Each pass over the row weighs it above seven pivots at once, and skips
the groups of tokens whose highest logit is too low. Invariant: sums are added up in one order, whoever does it.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(128)  # tokens that are looked at, or skipped, together
PART = tl.constexpr(8)  # neighbours that one thread adds up by itself


@triton.jit
def as_key(x, UNKNOWN: tl.constexpr):
    """An integer that grows with the number; neighbours among the logits' type's numbers are one apart."""
    bits = x.to(tl.int32, bitcast=True)
    return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> UNKNOWN).to(tl.int64)


@triton.jit
def as_number(key, UNKNOWN: tl.constexpr):
    """The lowest number with this key."""
    bits = (key << UNKNOWN).to(tl.int32)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) & -(1 << UNKNOWN)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def bound_by_count(tops, highest, wanted, UNKNOWN: tl.constexpr):
    """The key of the wanted-th highest group maximum: at least so many tokens are as high."""
    low, high = as_key(highest * 0 + float("-inf"), UNKNOWN), as_key(highest, UNKNOWN) + 1
    while high - low > 1:
        middle = (low + high) // 2
        enough = tl.sum((tops >= as_number(middle, UNKNOWN)).to(tl.int32), axis=0) >= wanted
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    return low


@triton.jit
def bound_by_weight(tops, weights, highest, scale, spare, UNKNOWN: tl.constexpr):
    """A key below which, by what is known of the groups, tokens weigh no more than `spare`."""
    low, high = as_key(highest * 0 + float("-inf"), UNKNOWN), as_key(highest, UNKNOWN) + 1
    others = weights - tl.exp2((tops - highest) * scale)
    while high - low > 1:
        middle = (low + high) // 2
        pivot = as_number(middle, UNKNOWN)
        below = tl.where(tops < pivot, weights, tl.minimum(others, GROUP * tl.exp2((pivot - highest) * scale)))
        spared = tl.sum(below, axis=0) <= spare
        low, high = tl.where(spared, middle, low), tl.where(spared, high, middle)
    return low


@triton.jit
def _list_groups(list_ptr, tops, lowest, num_groups):
    """Write the groups that hold a token of at least `lowest` to the list, in order; returns how many."""
    group = tl.arange(0, tops.shape[0])
    listed = ((tops >= lowest) & (group < num_groups)).to(tl.int32)
    tl.debug_barrier()  # who still reads the list is done
    tl.store(list_ptr + tl.cumsum(listed, axis=0) - 1, group, mask=listed > 0)
    tl.debug_barrier()
    return tl.sum(listed, axis=0)


@triton.jit
def _load_listed(x_ptr, list_ptr, start, count, vocab_size, NUM: tl.constexpr):
    """NUM listed groups from `start` on: their ids and the logits [NUM, GROUP], -inf where there is no token."""
    place = start + tl.arange(0, NUM)
    group = tl.load(list_ptr + place, mask=place < count, other=0)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + token, mask=(place < count)[:, None] & (token < vocab_size), other=float("-inf"))
    return group, x


@triton.jit
def _add_up(x, weight, pivot):
    """Weight at or above the pivot, added up so far as one thread can: [NUM, GROUP] -> [NUM, GROUP / PART]."""
    kept = tl.where(x >= pivot, weight, 0.0)
    return tl.sum(tl.reshape(kept, [x.shape[0], GROUP // PART, PART]), axis=2)


@triton.jit
def _pivot(low, high, nth: tl.constexpr, by_number, UNKNOWN: tl.constexpr):
    """The nth of seven pivots, evenly spaced as numbers or as keys."""
    key = low + (high - low) * nth // 8
    first, last = as_number(low, UNKNOWN), as_number(high, UNKNOWN)
    middle = as_key(first + (last - first) * (nth / 8), UNKNOWN)
    return as_number(tl.where(by_number, tl.minimum(tl.maximum(middle, low), high - 1), key), UNKNOWN)


@triton.jit
def _narrow(low, high, pivot, weight, wanted, UNKNOWN: tl.constexpr):
    key = as_key(pivot, UNKNOWN)
    enough = weight >= wanted
    return tl.where(enough, tl.maximum(low, key), low), tl.where(enough, high, tl.minimum(high, key))


@triton.jit
def search_threshold(
    x_ptr,
    list_ptr,
    tops,
    low,
    lowest,
    highest,
    scale,
    wanted,
    share,
    vocab_size,
    num_groups,
    BY_COUNT: tl.constexpr,
    NUM: tl.constexpr,
    UNKNOWN: tl.constexpr,
):
    """The highest key such that the tokens at or above it, of those of at least `lowest`, weigh at least `wanted`.

    low: a key that does. A negative `wanted` is `share` of their whole weight; returns it, too. BY_COUNT: each token
    weighs 1. Passes take turns: even spacing of numbers suits logits, of keys it halves the range whatever they are.
    """
    high = as_key(highest, UNKNOWN) + 1
    turn = 0
    while (high - low > 1) | (wanted < 0):
        count = _list_groups(list_ptr, tops, tl.maximum(as_number(low, UNKNOWN), lowest), num_groups)
        by_number = (turn % 2 == 0) & (as_number(low, UNKNOWN) > float("-inf"))
        pivot1 = _pivot(low, high, 1, by_number, UNKNOWN)
        pivot2 = _pivot(low, high, 2, by_number, UNKNOWN)
        pivot3 = _pivot(low, high, 3, by_number, UNKNOWN)
        pivot4 = _pivot(low, high, 4, by_number, UNKNOWN)
        pivot5 = _pivot(low, high, 5, by_number, UNKNOWN)
        pivot6 = _pivot(low, high, 6, by_number, UNKNOWN)
        pivot7 = _pivot(low, high, 7, by_number, UNKNOWN)
        sum0 = tl.zeros([NUM, GROUP // PART], tl.float32)
        sum1, sum2, sum3, sum4, sum5, sum6, sum7 = sum0, sum0, sum0, sum0, sum0, sum0, sum0
        _, ahead = _load_listed(x_ptr, list_ptr, 0, count, vocab_size, NUM)
        for start in range(0, count, NUM):
            x = ahead.to(tl.float32)
            _, ahead = _load_listed(x_ptr, list_ptr, start + NUM, count, vocab_size, NUM)
            if BY_COUNT:
                weight = tl.full([NUM, GROUP], 1.0, tl.float32)
            else:
                weight = tl.where(x >= lowest, tl.exp2((x - highest) * scale), 0.0)
                sum0 += tl.sum(tl.reshape(weight, [NUM, GROUP // PART, PART]), axis=2)
            sum1 += _add_up(x, weight, pivot1)
            sum2 += _add_up(x, weight, pivot2)
            sum3 += _add_up(x, weight, pivot3)
            sum4 += _add_up(x, weight, pivot4)
            sum5 += _add_up(x, weight, pivot5)
            sum6 += _add_up(x, weight, pivot6)
            sum7 += _add_up(x, weight, pivot7)
        wanted = tl.where(wanted < 0, share * _total(sum0), wanted)
        low, high = _narrow(low, high, pivot1, _total(sum1), wanted, UNKNOWN)
        low, high = _narrow(low, high, pivot2, _total(sum2), wanted, UNKNOWN)
        low, high = _narrow(low, high, pivot3, _total(sum3), wanted, UNKNOWN)
        low, high = _narrow(low, high, pivot4, _total(sum4), wanted, UNKNOWN)
        low, high = _narrow(low, high, pivot5, _total(sum5), wanted, UNKNOWN)
        low, high = _narrow(low, high, pivot6, _total(sum6), wanted, UNKNOWN)
        low, high = _narrow(low, high, pivot7, _total(sum7), wanted, UNKNOWN)
        turn += 1
    return low, wanted


@triton.jit
def _total(sums):
    return tl.sum(tl.reshape(sums, [sums.shape[0] * sums.shape[1]]).to(tl.float64), axis=0)


@triton.jit
def weigh_listed(
    x_ptr, list_ptr, weights_ptr, ties_ptr, tops, threshold, highest, scale, vocab_size, num_groups, NUM: tl.constexpr
):
    """Per group with a token at the threshold or above: the weight above it, and how many are exactly at it."""
    count = _list_groups(list_ptr, tops, threshold, num_groups)
    for start in range(0, count, NUM):
        group, x = _load_listed(x_ptr, list_ptr, start, count, vocab_size, NUM)
        x = x.to(tl.float32)
        weight = tl.where(x > threshold, tl.exp2((x - highest) * scale), 0.0)
        listed = start + tl.arange(0, NUM) < count
        tl.store(weights_ptr + group, tl.sum(weight, axis=1), mask=listed)
        tl.store(ties_ptr + group, tl.sum((x == threshold).to(tl.int32), axis=1), mask=listed)
    tl.debug_barrier()
