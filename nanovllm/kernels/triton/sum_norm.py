"""Sum over the ranks, residual addition and norm in one kernel, in Triton.

Owns who adds up which row. Values travel by words, as in `all_reduce.py`: each says by a flag that it has arrived. Of a
few rows every rank gets all parts, and adds up and norms all of them: one crossing of the link. Of more, a rank owns
every SIZE-th row: it gets the others' parts of its rows, adds them up, and sends what the norm made of them: two
crossings, and of each row a rank sends less the more ranks there are (reduce-scatter, then all-gather).

    memory of a rank    parts  [2, size, rows of a rank, words] int64: from each sender, of rows that this rank adds up
                        normed [2, rows, words]                 int64: of rows that others add up
                                |  `-- by row                          (flag << 32) | word, as in `all_reduce.py`
                                `-- calls take turns

While the words travel, nobody reads weights. So each program begins by asking for some of the next product's, and waits
for none: they go as far as the cache that all multiprocessors share.

Invariant: that of `all_reduce.py`. Row 0 of each call needs every rank's part, and is needed by every rank.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.all_reduce import PROGRAMS, arrived, memory_of, values_of, word_of
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import next_power_of_2

LINE = tl.constexpr(128)  # bytes of a line of the cache
LINES = tl.constexpr(1024)  # that a program asks for
MAX_WORDS = 8192  # of a row: a program holds it
NUM_WARPS = 8


@triton.jit
def _fetch(weight_ptr, num_bytes, program):
    line = program * LINES + tl.arange(0, LINES)
    place_ptr = weight_ptr.to(tl.pointer_type(tl.int8)) + tl.minimum(line * LINE, num_bytes - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [place_ptr], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _pair(ptr, word, mask, dtype: tl.constexpr):
    """The elements of a vector that stand where those of a word do."""
    if dtype == tl.float32:
        return tl.load(ptr + word, mask=mask, other=0.0).to(tl.float32), tl.zeros_like(word).to(tl.float32)
    else:
        low = tl.load(ptr + 2 * word, mask=mask, other=0.0).to(tl.float32)
        return low, tl.load(ptr + 2 * word + 1, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _rounded(low, high, dtype: tl.constexpr):
    return values_of(word_of(low, high, dtype), dtype)


@triton.jit(do_not_specialize=["num_rows", "num_weight_bytes"])
def _sum_norm_kernel(
    x_ptr,
    residual_ptr,
    norm_weight_ptr,
    out_ptr,
    total_ptr,
    weight_ptr,
    memories_ptr,
    calls_ptr,
    num_rows,
    num_weight_bytes,
    eps,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
    IS_FEW: tl.constexpr,
    PDL: tl.constexpr,
):
    """WORDS: of a row. ROOM: rows that a rank has memory for, of each sender."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    DIM: tl.constexpr = WORDS if dtype == tl.float32 else 2 * WORDS
    NORMED: tl.constexpr = 2 * SIZE * ROOM * WORDS * 8  # where that part of a memory begins
    program = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if weight_ptr is not None:
            _fetch(weight_ptr, num_weight_bytes, program)
    word = tl.arange(0, BLOCK)
    mask = word < WORDS
    norm_low, norm_high = _pair(norm_weight_ptr, word, mask, dtype)
    if PDL:
        tl.extra.cuda.gdc_wait()
    call = tl.load(calls_ptr + program, cache_modifier=".cg") + 1
    call = tl.where(call == 0, 2, call)
    flag = call.to(tl.int64) << 32
    half = call & 1
    x_ptr = x_ptr.to(tl.pointer_type(tl.int32))
    residual_ptr = residual_ptr.to(tl.pointer_type(tl.int32))
    out_ptr = out_ptr.to(tl.pointer_type(tl.int32))
    total_ptr = total_ptr.to(tl.pointer_type(tl.int32))

    for row in range(program, num_rows, PROGRAMS):
        own = tl.load(x_ptr + row * WORDS + word, mask=mask, other=0)
        flagged = flag | (own.to(tl.int64) & 0xFFFFFFFF)
        if IS_FEW:
            place = ((half * SIZE + RANK) * ROOM + row) * WORDS + word
            for ahead in tl.static_range(1, SIZE):
                tl.store(memory_of(memories_ptr, (RANK + ahead) % SIZE, 0, tl.int64) + place, flagged, mask=mask)
        else:
            place = ((half * SIZE + RANK) * ROOM + row // SIZE) * WORDS + word
            if row % SIZE != RANK:
                tl.store(memory_of(memories_ptr, row % SIZE, 0, tl.int64) + place, flagged, mask=mask)

    parts_ptr = memory_of(memories_ptr, RANK, 0, tl.int64)
    for row in range(program, num_rows, PROGRAMS):
        if IS_FEW or row % SIZE == RANK:
            residual = tl.load(residual_ptr + row * WORDS + word, mask=mask, other=0)
            low, high = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            nth = row if IS_FEW else row // SIZE
            for rank in tl.static_range(SIZE):
                if rank == RANK:
                    part = tl.load(x_ptr + row * WORDS + word, mask=mask, other=0)
                else:
                    part = arrived(parts_ptr, ((half * SIZE + rank) * ROOM + nth) * WORDS + word, mask, call)
                part_low, part_high = values_of(part, dtype)
                low += part_low
                high += part_high
            low, high = _rounded(low, high, dtype)
            residual_low, residual_high = values_of(residual, dtype)
            total = word_of(low + residual_low, high + residual_high, dtype)
            tl.store(total_ptr + row * WORDS + word, total, mask=mask)
            low, high = values_of(total, dtype)
            scale = tl.rsqrt(tl.sum(low * low + high * high, axis=0) / DIM + eps)
            low, high = _rounded(low * scale, high * scale, dtype)
            normed = word_of(low * norm_low, high * norm_high, dtype)
            tl.store(out_ptr + row * WORDS + word, normed, mask=mask)
            if not IS_FEW:
                flagged = flag | (normed.to(tl.int64) & 0xFFFFFFFF)
                place = (half * SIZE * ROOM + row) * WORDS + word
                for ahead in tl.static_range(1, SIZE):
                    there_ptr = memory_of(memories_ptr, (RANK + ahead) % SIZE, NORMED, tl.int64)
                    tl.store(there_ptr + place, flagged, mask=mask)
    if not IS_FEW:
        normed_ptr = memory_of(memories_ptr, RANK, NORMED, tl.int64)
        for row in range(program, num_rows, PROGRAMS):
            if row % SIZE != RANK:
                normed = arrived(normed_ptr, (half * SIZE * ROOM + row) * WORDS + word, mask, call)
                tl.store(out_ptr + row * WORDS + word, normed, mask=mask)
    tl.store(calls_ptr + program, call)


def memory_bytes(size: int, words: int, room: int) -> int:
    """Of each of `size` ranks, for rows of so many words, `room` of them from each sender."""
    return 2 * 2 * size * room * words * 8


def sum_norm_triton(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    next_weight: Tensor | None,
    memories: Tensor,
    calls: Tensor,
    rank: int,
    size: int,
    room: int,
    is_few: bool,
) -> tuple[Tensor, Tensor]:
    """See `sum_norm.SumNorm`. x, residual [num_rows, dim], contiguous, of at most room * size rows, and room if is_few:
    if every rank adds up all of them. memories, calls: as of `all_reduce_triton`, by `memory_bytes`."""
    num_rows, dim = x.shape
    words = dim * x.element_size() // 4
    out, total = torch.empty_like(x), torch.empty_like(x)
    launch(
        _sum_norm_kernel, (PROGRAMS.value,), x.device,
        x, residual, norm_weight, out, total, next_weight, memories, calls, num_rows,
        0 if next_weight is None else next_weight.numel() * next_weight.element_size(), eps,
        RANK=rank, SIZE=size, WORDS=words, BLOCK=next_power_of_2(words), ROOM=room, IS_FEW=is_few,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return out, total
