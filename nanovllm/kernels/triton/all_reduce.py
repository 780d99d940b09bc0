"""One-shot all-reduce in Triton: every rank writes its x into the others' memory, and adds up what it gets.

Owns the two ways to know that what is read has arrived. "words", for little: 4 bytes of values travel with 4 bytes of a
flag, in one store that arrives whole, and a reader looks at a place until its flag is this call's number (NCCL's LL
protocol; Hu et al., 2025, "Demystifying NCCL"). No message about messages, no fence, no barrier: the sum is ready one
crossing of the link after the last rank has begun. "bulk": values travel as they are, at half the bytes, and a program
that has sent all of its own says so in one flag, at the price of a fence.

    memory of a rank    words  [2, size, words_bytes / 4] int64: (flag << 32) | word     a word: one float32, or two
                        bulk   [2, size, bulk_bytes / 4]  int32: word                            values of 16 bits
                        flags  [size, PROGRAMS]           int32: the sender's last bulk call
                                |  |     `-- by place in x
                                |  `-- by sender
                                `-- calls take turns

Invariant: nobody writes a place that somebody has yet to read. A rank that begins call n has ended call n - 1, for
which it needed every rank's x; a rank sends its x of n - 1 when it has ended n - 2, and so has read the half of its
memory that call n is written to. This needs equal call numbers everywhere, so every program counts every call, also
if it has nothing to do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common.launch import launch

# Of each call: they wait for other ranks', so all must have a place on the device at once.
PROGRAMS = tl.constexpr(128)
WORDS = 1024  # that a program takes at a time
NUM_WARPS = 4


@triton.jit
def values_of(word, dtype: tl.constexpr):
    """The two values of a word in float32, lower half first; of a float32, itself and nothing."""
    if dtype == tl.float32:
        return word.to(tl.float32, bitcast=True), tl.zeros_like(word).to(tl.float32)
    else:
        low = (word & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
        high = (word >> 16).to(tl.int16).to(dtype, bitcast=True)
        return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def word_of(low, high, dtype: tl.constexpr):
    """The inverse of `values_of`, rounding to the dtype."""
    if dtype == tl.float32:
        return low.to(tl.int32, bitcast=True)
    else:
        low_bits = low.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low_bits | (high.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def memory_of(memories_ptr, rank, OFFSET: tl.constexpr, dtype: tl.constexpr):
    """The part of a rank's memory that begins at OFFSET bytes."""
    address = tl.load(memories_ptr + rank) + OFFSET
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def arrived(part_ptr, place, mask, call):
    """The words of another rank, once they are there."""
    got = tl.load(part_ptr + place, mask=mask, other=0, volatile=True)
    while tl.max((((got >> 32).to(tl.int32) != call) & mask).to(tl.int32), axis=0) > 0:
        got = tl.load(part_ptr + place, mask=mask, other=0, volatile=True)
    return got.to(tl.int32)


@triton.jit
def _all_reduce_kernel(
    x_ptr,
    out_ptr,
    memories_ptr,
    calls_ptr,
    num_words,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    IS_BULK: tl.constexpr,
    OFFSET: tl.constexpr,
    CAPACITY: tl.constexpr,
    FLAGS: tl.constexpr,
    WORDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """OFFSET, FLAGS: where in a rank's memory this way's part and the flags begin. CAPACITY: words from each sender."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    kept: tl.constexpr = tl.int32 if IS_BULK else tl.int64
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    program = tl.program_id(0)
    call = tl.load(calls_ptr + program, cache_modifier=".cg") + 1  # past the L1 cache: who wrote it may be elsewhere
    call = tl.where(call == 0, 2, call)  # after 2**32 calls: 0 is the flag of what was never written
    half = (call & 1) * SIZE * CAPACITY
    x_ptr = x_ptr.to(tl.pointer_type(tl.int32))
    out_ptr = out_ptr.to(tl.pointer_type(tl.int32))
    for start in range(program * WORDS, num_words, PROGRAMS * WORDS):
        place = start + tl.arange(0, WORDS)
        mask = place < num_words
        word = tl.load(x_ptr + place, mask=mask, other=0)
        if not IS_BULK:
            word = (call.to(tl.int64) << 32) | (word.to(tl.int64) & 0xFFFFFFFF)
        for ahead in tl.static_range(1, SIZE):
            part_ptr = memory_of(memories_ptr, (RANK + ahead) % SIZE, OFFSET, kept) + half + RANK * CAPACITY
            tl.store(part_ptr + place, word, mask=mask)
    if IS_BULK:
        tl.debug_barrier()  # every warp's stores come before the one thread's release
        for ahead in tl.static_range(1, SIZE):
            flags_ptr = memory_of(memories_ptr, (RANK + ahead) % SIZE, FLAGS, tl.int32)
            tl.atomic_xchg(flags_ptr + RANK * PROGRAMS + program, call, sem="release", scope="sys")
        for ahead in tl.static_range(1, SIZE):
            flag_ptr = memory_of(memories_ptr, RANK, FLAGS, tl.int32) + (RANK + ahead) % SIZE * PROGRAMS + program
            # Who has sent may be one call ahead by the time that this program looks.
            while tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys") - call < 0:
                pass
        tl.debug_barrier()
    own_ptr = memory_of(memories_ptr, RANK, OFFSET, kept) + half
    for start in range(program * WORDS, num_words, PROGRAMS * WORDS):
        place = start + tl.arange(0, WORDS)
        mask = place < num_words
        low_sum = tl.zeros([WORDS], tl.float32)
        high_sum = low_sum
        for rank in tl.static_range(SIZE):
            if rank == RANK:
                word = tl.load(x_ptr + place, mask=mask, other=0)
            elif IS_BULK:
                word = tl.load(own_ptr + rank * CAPACITY + place, mask=mask, other=0, cache_modifier=".cg")
            else:
                word = arrived(own_ptr + rank * CAPACITY, place, mask, call)
            low, high = values_of(word, dtype)
            low_sum += low
            high_sum += high
        tl.store(out_ptr + place, word_of(low_sum, high_sum, dtype), mask=mask)
    tl.store(calls_ptr + program, call)


def memory_bytes(size: int, words_bytes: int, bulk_bytes: int) -> int:
    """Of each of `size` ranks, for x of at most so many bytes by words, and in bulk."""
    return size * (4 * words_bytes + 2 * bulk_bytes + 4 * PROGRAMS.value)


def all_reduce_triton(
    x: Tensor, memories: Tensor, calls: Tensor, rank: int, size: int, words_bytes: int, bulk_bytes: int
) -> Tensor:
    """The sum of the ranks' x, in x's dtype, added up in float32 in the order of the ranks: the same bits on each.

    x: contiguous, at most bulk_bytes long and by words up to words_bytes, both multiples of 64. memories [size] int64:
    addresses of `memory_bytes` that are zero at first, as this device reaches them. calls [PROGRAMS] int32, zero too.
    """
    out = torch.empty_like(x)
    num_bytes = x.numel() * x.element_size()
    assert num_bytes <= bulk_bytes
    is_bulk = num_bytes > words_bytes
    launch(
        _all_reduce_kernel, (PROGRAMS.value,), x.device,
        x, out, memories, calls, num_bytes // 4, RANK=rank, SIZE=size, IS_BULK=is_bulk,
        OFFSET=4 * size * words_bytes if is_bulk else 0, CAPACITY=(bulk_bytes if is_bulk else words_bytes) // 4,
        FLAGS=size * (4 * words_bytes + 2 * bulk_bytes), WORDS=WORDS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out
