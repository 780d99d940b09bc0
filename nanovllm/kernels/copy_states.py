"""Copies of states from slot to slot, for those of a step's tokens that ask for one.

Owns the meaning, in plain PyTorch; a GPU runs all layers in one launch. Invariant: no slot is both read and written.
"""

from torch import Tensor

from nanovllm.kernels.dispatch import use_triton


def copy_states(states: Tensor, sources: Tensor, targets: Tensor) -> None:
    """states [num_layers, num_slots, num_floats] float32; sources, targets [n] int32: slots, -1 for a target: none."""
    if use_triton(states):
        from nanovllm.kernels.triton.copy_states import copy_states_triton

        copy_states_triton(states, sources, targets)
    else:
        copy_states_reference(states, sources, targets)


def copy_states_reference(states: Tensor, sources: Tensor, targets: Tensor) -> None:
    is_asked = targets >= 0
    states[:, targets[is_asked]] = states[:, sources[is_asked]]
