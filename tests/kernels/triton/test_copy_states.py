"""The Triton copies of states against their reference."""

import torch

from nanovllm.kernels.copy_states import copy_states_reference
from tests.kernels.twins import DEVICE, load_twin, twin_test

twin = load_twin("copy_states")
pytestmark = twin_test


def test_slots_that_are_asked_for_are_copied_in_every_layer() -> None:
    states = torch.arange(2 * 9 * 9000, dtype=torch.float32, device=DEVICE).view(2, 9, 9000)
    sources, targets = torch.tensor([[5, 7, 8, 6], [1, -1, 0, -1]], dtype=torch.int32, device=DEVICE)
    wanted = states.clone()
    copy_states_reference(wanted, sources, targets)
    twin.copy_states_triton(states, sources, targets)
    assert torch.equal(states, wanted) and wanted[1, 1, 8999] == (9 + 5) * 9000 + 8999
