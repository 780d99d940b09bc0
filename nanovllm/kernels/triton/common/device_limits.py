"""Limits of GPUs by compute capability, where a kernel's shape depends on them.

Owns the table, and asks PyTorch for each device once: a step asks for each kernel. Invariant: the answer depends on the
capability, and on the version of Triton where it must, never on the name of a GPU.
"""

from functools import cache
from importlib.metadata import version

import torch

# Of Triton: Gluon is experimental, and another version may understand the same lines in another way.
_KNOWN_GLUON = ("3.6.",)
# CUDA Programming Guide, table of compute capabilities.
_LARGEST_SHARED_MEMORY = {(9, 0), (10, 0), (10, 3)}
_LARGE_SHARED_MEMORY = {(8, 0)} | _LARGEST_SHARED_MEMORY


@cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def has_fp8(device: torch.device) -> bool:
    """Does Triton convert FP8 (e4m3) there, and cuBLAS multiply it?"""
    return device.type != "cuda" or compute_capability(device) >= (8, 9)


def has_large_shared_memory(device: torch.device) -> bool:
    """Can a program have 160 KB? GPUs for data centres have as much, others (8.6, 8.9, 12.0) 99 KB."""
    return device.type != "cuda" or compute_capability(device) in _LARGE_SHARED_MEMORY


def has_warp_groups(device: torch.device) -> bool:
    """Does Triton multiply tiles of 64 rows and at least 16 columns by four warps together? Hopper's instruction."""
    return device.type == "cuda" and compute_capability(device)[0] == 9


def has_largest_shared_memory(device: torch.device) -> bool:
    """Can a program have 224 KB?"""
    return device.type != "cuda" or compute_capability(device) in _LARGEST_SHARED_MEMORY


@cache
def has_hopper_gluon(device: torch.device) -> bool:
    """Is it a Hopper GPU, and Triton's Gluon one that is known here?"""
    return device.type == "cuda" and compute_capability(device)[0] == 9 and version("triton").startswith(_KNOWN_GLUON)
