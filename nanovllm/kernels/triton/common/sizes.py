"""Integer arithmetic of a launch on the host: cdiv, next_power_of_2, and coarse sizes.

Owns two functions that Triton has, too: called from Python, each of Triton's takes a tenth of the time of a launch.
Invariant: they take and return plain integers.
"""


def cdiv(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The smallest power of 2 that is `size`, which is at least 1, or more."""
    return 1 << (size - 1).bit_length()


def coarse_size(size: int) -> int:
    """16, 64, 256, ...: the smallest that is `size` or more. For a constant of a kernel that only bounds a number: it
    is compiled for few of them, and all can be compiled ahead."""
    return max(16, 4 ** (((size - 1).bit_length() + 1) // 2))
