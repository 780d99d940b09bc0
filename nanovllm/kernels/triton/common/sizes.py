"""Sizes that a launch is made of, on the host.

Owns two functions that Triton has too, in a form that kernels can call: there, each call takes as long as a tenth of a
launch. Invariant: they take and return plain integers.
"""


def cdiv(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The smallest power of 2 that is `size`, which is at least 1, or more."""
    return 1 << (size - 1).bit_length()
