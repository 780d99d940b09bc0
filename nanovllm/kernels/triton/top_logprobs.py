"""Log-probabilities on a GPU: of a row's token and of the most likely ones beside it, in two launches.

Owns the arithmetic of `sampling/logprobs.py` by the same definitions, for a few tokens a row. Invariant: a row is
computed from that row alone, in parts of a fixed size that are put together in one order, so its bits do not depend on
the rows beside it.

    parts    one program per row and part:   highest logit, weight, how many are above the row's own token, k highest
    merge    one program per row:            the same of the whole row

A token is ranked by one 64-bit key, its logit above the complement of its id: the k highest keys are the k most likely
tokens, lower ids first among equals.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2

MOST = 32  # tokens beside a row's own; each takes a pass over what a program holds
PART = 4096  # tokens of a program
NO_KEY = tl.constexpr(-(1 << 63))


@triton.jit
def _keys(x, token):
    """x float32, token int32 -> int64 that grow with x, and for equal x with falling token."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0, which it equals
    rising = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (rising << 32) + (0xFFFFFFFF - token.to(tl.int64))


@triton.jit
def _number_of(key):
    """The float32 of a key."""
    bits = (key >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["k"])
def _parts_kernel(
    logits_ptr,
    logits_stride,
    members_ptr,
    tokens_ptr,
    tops_ptr,
    weights_ptr,
    above_ptr,
    keys_ptr,
    vocab_size,
    num_parts,
    k,
    PART: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    part, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    member = tl.load(members_ptr + index).to(tl.int64)
    x_ptr = logits_ptr + member * logits_stride
    own = tl.load(x_ptr + tl.load(tokens_ptr + member)).to(tl.float32)
    token = part * PART + tl.arange(0, PART)
    x = tl.load(x_ptr + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    top = tl.max(x, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    place = index * num_parts + part
    tl.store(tops_ptr + place, top)
    tl.store(weights_ptr + place, tl.sum(tl.exp(x - base), axis=0))
    tl.store(above_ptr + place, tl.sum((x > own).to(tl.int32), axis=0))
    keys = tl.where(token < vocab_size, _keys(x, token), NO_KEY)
    for nth in range(k):
        highest = tl.max(keys, axis=0)
        tl.store(keys_ptr + place * k + nth, highest)
        keys = tl.where(keys == highest, NO_KEY, keys)


@triton.jit(do_not_specialize=["k"])
def _merge_kernel(
    logits_ptr,
    logits_stride,
    members_ptr,
    tokens_ptr,
    tops_ptr,
    weights_ptr,
    above_ptr,
    keys_ptr,
    out_ptr,
    num_parts,
    k,
    MAX_PARTS: tl.constexpr,
    MAX_KEYS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    index = tl.program_id(0).to(tl.int64)
    member = tl.load(members_ptr + index).to(tl.int64)
    own_id = tl.load(tokens_ptr + member)
    own = tl.load(logits_ptr + member * logits_stride + own_id).to(tl.float32)
    part = tl.arange(0, MAX_PARTS)
    place = index * num_parts + part
    tops = tl.load(tops_ptr + place, mask=part < num_parts, other=float("-inf"))
    weights = tl.load(weights_ptr + place, mask=part < num_parts, other=0.0)
    above = tl.load(above_ptr + place, mask=part < num_parts, other=0)
    top = tl.max(tops, axis=0)
    base = tl.where(tops == float("-inf"), 0.0, tops)
    log_weight = tl.log(tl.sum(weights * tl.exp(base - top), axis=0))

    out_ptr += index * (k + 1) * 3
    tl.store(out_ptr, own_id)
    tl.store(out_ptr + 1, ((own - top) - log_weight).to(tl.int32, bitcast=True))
    tl.store(out_ptr + 2, 1 + tl.sum(above, axis=0))
    nth_key = tl.arange(0, MAX_KEYS)
    keys = tl.load(keys_ptr + index * num_parts * k + nth_key, mask=nth_key < num_parts * k, other=NO_KEY)
    left = keys
    for _ in range(k):
        highest = tl.max(left, axis=0)
        left = tl.where(left == highest, NO_KEY, left)
        out_ptr += 3
        tl.store(out_ptr, (0xFFFFFFFF - (highest & 0xFFFFFFFF)).to(tl.int32))
        tl.store(out_ptr + 1, ((_number_of(highest) - top) - log_weight).to(tl.int32, bitcast=True))
        tl.store(out_ptr + 2, 1 + tl.sum(((keys >> 32) > (highest >> 32)).to(tl.int32), axis=0))


def top_logprobs_triton(logits: Tensor, tokens: Tensor, members: Tensor, k: int) -> Tensor:
    """`logprobs.packed` of `top_logprobs(logits[members], tokens[members], k)`: int32 [m, 1 + k, 3].

    logits [n, V] float32, float16 or bfloat16, the last dimension contiguous; tokens [n] int32 in [0, V); members [m]
    int64; k <= min(V, MOST).
    """
    num_rows, vocab_size = len(members), logits.shape[1]
    num_parts = cdiv(vocab_size, PART)
    out = torch.empty((num_rows, 1 + k, 3), dtype=torch.int32, device=logits.device)
    if num_rows == 0:
        return out
    tops, weights, above = (
        torch.empty((num_rows, num_parts), dtype=dtype, device=logits.device)
        for dtype in (torch.float32, torch.float32, torch.int32)
    )
    keys = torch.empty((num_rows, num_parts, max(k, 1)), dtype=torch.int64, device=logits.device)
    launch(
        _parts_kernel, (num_parts, num_rows), logits.device,
        logits, logits.stride(0), members, tokens, tops, weights, above, keys, vocab_size, num_parts, k,
        PART=PART, num_warps=8,
    )  # fmt: skip
    launch(
        _merge_kernel, (num_rows,), logits.device,
        logits, logits.stride(0), members, tokens, tops, weights, above, keys, out, num_parts, k,
        MAX_PARTS=next_power_of_2(num_parts), MAX_KEYS=next_power_of_2(num_parts * MOST), num_warps=4,
    )  # fmt: skip
    return out
