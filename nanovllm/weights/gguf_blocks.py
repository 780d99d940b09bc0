"""dequantize: from the blocks of a GGUF tensor to numbers, a cacheful at a time.

Owns the block formats; the commonest are unpacked here with PyTorch, in threads, all others by the `gguf` package.
Invariant: the numbers of `gguf.quants`, bit for bit, rounded once to the dtype that is asked for; beside the result it
takes the memory of a few thousand numbers a thread.

Format: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from functools import partial

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from nanovllm.model_files.gguf_file import TensorInfo

PLAIN_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}

# So many numbers and their parts stay in a core's cache, and are as many as torch computes without waking its other
# threads: those wait for each other after every operation, which on a busy machine made reading a hundred times slower.
_NUMBERS_AT_ONCE = 32768
# Bits are taken apart and scales are read for more numbers at a time: an operation on few costs as much. Four bytes at
# a time, these are as many elements.
_NUMBERS_A_STEP = 8 * _NUMBERS_AT_ONCE
_STEPS_A_TASK = 8
_LOW_NIBBLES, _PAIRS_UP, _LOW_BITS = 0x0F0F0F0F, 0x30303030, 0x01010101  # masks of four bytes

Unpack = Callable[[Tensor, Tensor], object]  # (blocks uint8 [n, bytes of a block], numbers [n, numbers of a block])


def dequantize(
    rows: np.ndarray,
    info: TensorInfo,
    dtype: torch.dtype = torch.float32,
    threads: Executor | None = None,
    place: Tensor | None = None,
) -> Tensor:
    """Turn a tensor's bytes (uint8 [rows, bytes of a row]) into numbers. Returns a CPU tensor of `info.shape`.

    Plain floats keep their type and stay mapped; quantized blocks come in `dtype`. threads: unpack side by side. place:
    contiguous memory for the numbers, used if it has that shape and dtype.
    """
    kind = info.quantization
    if kind in PLAIN_DTYPES:
        return torch.from_numpy(rows).view(PLAIN_DTYPES[kind]).reshape(info.shape)
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    unpack = _UNPACKERS.get(kind, partial(_unpack_with_gguf, info))
    blocks = torch.from_numpy(rows).view(-1, block_bytes)
    if place is None or tuple(place.shape) != tuple(info.shape) or place.dtype != dtype:
        place = torch.empty(info.shape, dtype=dtype)
    numbers = place.view(-1, block_size)
    step = _NUMBERS_A_STEP // block_size

    def unpack_task(some_blocks: Tensor, some_numbers: Tensor) -> None:
        for pair in zip(some_blocks.split(step), some_numbers.split(step), strict=True):
            unpack(*pair)

    tasks = blocks.split(_STEPS_A_TASK * step), numbers.split(_STEPS_A_TASK * step)
    list(map(unpack_task, *tasks) if threads is None else threads.map(unpack_task, *tasks))
    return place


def _chunks(numbers: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Which of `numbers` come next, and the cacheful of float32 where to put them; it is copied when that is done."""
    step = _NUMBERS_AT_ONCE // numbers.shape[1]
    scratch = torch.empty(step, numbers.shape[1])
    for start in range(0, len(numbers), step):
        part = slice(start, min(start + step, len(numbers)))
        values = scratch[: part.stop - start]
        yield part, values
        numbers[part].copy_(values)


def _unpack_with_gguf(info: TensorInfo, blocks: Tensor, numbers: Tensor) -> None:
    try:
        with np.errstate(all="ignore"):  # infinities of a damaged file; NumPy would warn of them in some kinds only
            for part, values in _chunks(numbers):
                values.copy_(torch.from_numpy(quants.dequantize(blocks[part].numpy(), info.quantization)))
    except NotImplementedError:
        raise NotImplementedError(
            f"tensor {info.name} is quantized as {info.quantization.name}, which the installed gguf package cannot "
            "unpack: update it (pip install -U gguf) or use a file of another quantization"
        ) from None


# --- blocks of 32 numbers ----------------------------------------------------------


def _unpack_q4_0(blocks: Tensor, numbers: Tensor) -> None:
    """d | 16 bytes, low nibbles before high ones, which stand for -8 to 7."""
    scales, nibbles = halves(blocks[:, :2]), unpack_nibbles(blocks[:, 2:], 16)
    for part, values in _chunks(numbers):
        values.copy_(nibbles[part]).sub_(8).mul_(scales[part])


def _unpack_q4_1(blocks: Tensor, numbers: Tensor) -> None:
    """d, the least number | 16 bytes, low nibbles before high ones."""
    headers, nibbles = halves(blocks[:, :4]), unpack_nibbles(blocks[:, 4:], 16)
    for part, values in _chunks(numbers):
        values.copy_(nibbles[part]).mul_(headers[part, :1]).add_(headers[part, 1:])


def _unpack_q8_0(blocks: Tensor, numbers: Tensor) -> None:
    scales = halves(blocks[:, :2])
    for part, values in _chunks(numbers):
        values.copy_(blocks[part, 2:].view(torch.int8)).mul_(scales[part])


# --- super-blocks of 256 numbers, whose parts have scales of their own ------------


def _unpack_q4_k(blocks: Tensor, numbers: Tensor) -> None:
    """d dmin | 12 bytes: 8 scales and 8 minima of 6 bits | 4 x 32 bytes, low nibbles before high ones."""
    scales, minima = scales_and_minima(blocks)
    nibbles = unpack_nibbles(blocks[:, 16:], 32)
    for part, values in _chunks(numbers):
        values.copy_(nibbles[part])
        values.view(-1, 8, 32).mul_(scales[part]).sub_(minima[part])


def _unpack_q5_k(blocks: Tensor, numbers: Tensor) -> None:
    """As Q4_K; before the nibbles 32 bytes, whose bit j is the fifth bit of part j."""
    scales, minima = scales_and_minima(blocks)
    nibbles, bits = unpack_nibbles(blocks[:, 48:], 32), fifth_bits_of_q5_k(blocks)
    for part, values in _chunks(numbers):
        values.copy_(nibbles[part] | bits[part])
        values.view(-1, 8, 32).mul_(scales[part]).sub_(minima[part])


def _unpack_q6_k(blocks: Tensor, numbers: Tensor) -> None:
    """2 x 64 bytes with the low nibbles | 2 x 32 bytes with pairs of high bits | 16 scales of 8 bits | d."""
    scales = (blocks[:, 192:208].view(torch.int8).float() * halves(blocks[:, 208:]))[:, :, None]
    nibbles, pairs = unpack_nibbles(blocks[:, :128], 64), high_pairs_of_q6_k(blocks)
    for part, values in _chunks(numbers):
        values.copy_(nibbles[part] | pairs[part]).sub_(32)
        values.view(-1, 16, 16).mul_(scales[part])


def fifth_bits_of_q5_k(blocks: Tensor) -> Tensor:
    """uint8 [n, 256], in the order of the nibbles and where they go."""
    fifth = _words(blocks[:, 16:48])[:, None]
    return torch.cat([((fifth >> j) & _LOW_BITS) << 4 for j in range(8)], dim=1).view(torch.uint8).view(-1, 256)


def high_pairs_of_q6_k(blocks: Tensor) -> Tensor:
    """uint8 [n, 256], in the order of the nibbles and where they go."""
    high = _words(blocks[:, 128:192]).view(-1, 2, 8)
    # The pairs of part 0 move up by four bits, those of parts 1 to 3 by two, not at all, and down by two.
    moved = [part & _PAIRS_UP for part in (high << 4, high << 2, high, high >> 2)]
    return torch.cat(moved, dim=2).view(torch.uint8).view(-1, 256)


def scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of the 8 parts of a Q4_K or Q5_K block, float32 [n, 8, 1] each.

    Parts 0 to 3 have their 6 bits in one byte, scales first; of parts 4 to 7 the last four bytes hold the low nibbles,
    and the upper two bits of the others the high ones.
    """
    headers = halves(blocks[:, :4])
    first, second, third = blocks[:, 4:16].view(-1, 3, 4).unbind(1)
    scales = torch.cat((first & 0x3F, (third & 0x0F) | ((first >> 6) << 4)), dim=1)
    minima = torch.cat((second & 0x3F, (third >> 4) | ((second >> 6) << 4)), dim=1)
    return (scales * headers[:, :1])[:, :, None], (minima * headers[:, 1:])[:, :, None]


# --- parts of blocks ---------------------------------------------------------------


def halves(column: Tensor) -> Tensor:
    """float16 numbers of each block, as float32."""
    return column.contiguous().view(torch.float16).float()


def _words(column: Tensor) -> Tensor:
    """Bytes of each block, four at a time: masks and shifts work on all four."""
    return column.contiguous().view(torch.int32)


def unpack_nibbles(column: Tensor, size: int) -> Tensor:
    """The nibbles of each `size` bytes, first the low ones and then the high ones: uint8 [n, twice the bytes]."""
    packed = _words(column).view(len(column), -1, size // 4)
    halves = torch.cat((packed & _LOW_NIBBLES, (packed >> 4) & _LOW_NIBBLES), dim=2)
    return halves.view(torch.uint8).view(len(column), -1)


_UNPACKERS: dict[GGMLQuantizationType, Unpack] = {
    GGMLQuantizationType.Q4_0: _unpack_q4_0,
    GGMLQuantizationType.Q4_1: _unpack_q4_1,
    GGMLQuantizationType.Q8_0: _unpack_q8_0,
    GGMLQuantizationType.Q4_K: _unpack_q4_k,
    GGMLQuantizationType.Q5_K: _unpack_q5_k,
    GGMLQuantizationType.Q6_K: _unpack_q6_k,
}
