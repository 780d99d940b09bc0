"""Columns of all ranks side by side, in Triton: each rank writes its own where they belong in every rank's memory.

Owns how that is known to be done: a program that has sent all of its own says so in one flag for each rank, and waits
for the flags of the programs of its number. Invariant: that of `all_reduce.py`; the two halves of the memory take
turns, as the host says.
"""

import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.all_reduce import PROGRAMS, memory_of
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import next_power_of_2

CHUNK = 2048  # words of 4 bytes that a program takes at a time
NUM_WARPS = 8


@triton.jit(do_not_specialize=["num_rows"])
def _all_gather_kernel(
    x_ptr,
    memories_ptr,
    calls_ptr,
    num_rows,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,
    FLAGS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """WORDS, WIDTH: of a row of x, and of the result. OFFSET, FLAGS: where in a memory the result and flags begin."""
    BEGIN: tl.constexpr = RANK * WORDS
    OWN: tl.constexpr = min(WORDS, max(WIDTH - BEGIN, 0))  # the last columns may be padding
    CHUNKS: tl.constexpr = (OWN + CHUNK - 1) // CHUNK
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    program = tl.program_id(0)
    call = tl.load(calls_ptr + program, cache_modifier=".cg") + 1
    x_ptr = x_ptr.to(tl.pointer_type(tl.int32))
    for part in range(program, num_rows * CHUNKS, PROGRAMS):
        row, col = part // CHUNKS, part % CHUNKS * CHUNK + tl.arange(0, CHUNK)
        word = tl.load(x_ptr + row * WORDS + col, mask=col < OWN, other=0)
        for ahead in tl.static_range(SIZE):
            out_ptr = memory_of(memories_ptr, (RANK + ahead) % SIZE, OFFSET, tl.int32)
            tl.store(out_ptr + row * WIDTH + BEGIN + col, word, mask=col < OWN)
    tl.debug_barrier()  # every warp's stores come before the one thread's release
    for ahead in tl.static_range(1, SIZE):
        flags_ptr = memory_of(memories_ptr, (RANK + ahead) % SIZE, FLAGS, tl.int32)
        tl.atomic_xchg(flags_ptr + RANK * PROGRAMS + program, call, sem="release", scope="sys")
    for ahead in tl.static_range(1, SIZE):
        flag_ptr = memory_of(memories_ptr, RANK, FLAGS, tl.int32) + (RANK + ahead) % SIZE * PROGRAMS + program
        while tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys") - call < 0:
            pass
    tl.store(calls_ptr + program, call)


def all_gather_triton(
    x: Tensor,
    own: Tensor,
    memories: Tensor,
    calls: Tensor,
    rank: int,
    size: int,
    width: int,
    half_bytes: int,
    half: int,
) -> Tensor:
    """The ranks' x [num_rows, n] side by side, cut to `width`: [num_rows, width], in this rank's memory.

    x: contiguous; its rows and the result's are multiples of 16 bytes. own: this rank's memory, [2 * half_bytes + 4 *
    size * PROGRAMS] uint8, zero at first; memories [size] int64: addresses of all ranks'. half: 0 or 1, as on all.
    """
    num_rows, itemsize = x.shape[0], x.element_size()
    num_bytes = num_rows * width * itemsize
    assert num_bytes <= half_bytes
    words = x.shape[1] * itemsize // 4
    launch(
        _all_gather_kernel, (PROGRAMS.value,), x.device,
        x, memories, calls, num_rows, RANK=rank, SIZE=size, WORDS=words, WIDTH=width * itemsize // 4,
        OFFSET=half * half_bytes, FLAGS=2 * half_bytes, CHUNK=min(CHUNK, next_power_of_2(words)),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return own[half * half_bytes :][:num_bytes].view(x.dtype).view(num_rows, width)


def memory_bytes(size: int, half_bytes: int) -> int:
    """Of each of `size` ranks."""
    return 2 * half_bytes + 4 * size * PROGRAMS.value
