"""Integer arithmetic of a launch on the host: cdiv and next_power_of_2.

Owns two functions that Triton has, too. Called from Python, each of Triton's takes a tenth of the time of a launch.
Invariant: they take and return plain integers.
"""


def cdiv(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The smallest power of 2 that is `size`, which is at least 1, or more."""
    return 1 << (size - 1).bit_length()
