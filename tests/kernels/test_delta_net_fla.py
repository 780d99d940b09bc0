"""The gated delta net beside flash-linear-attention's own, a second reference: extra `fla`."""

import pytest
import torch

from nanovllm.kernels.causal_conv import conv_silu_reference
from nanovllm.kernels.delta_net import delta_net_reference, gated_norm, heads
from tests.kernels.state_cases import make_states_case
from tests.kernels.test_delta_net import copy, make_inputs

naive = pytest.importorskip(
    "fla.ops.gated_delta_rule.naive", reason="the extra fla is not installed", exc_type=ImportError
)


@pytest.mark.parametrize("num_before", [0, 9])
def test_the_reference_equals_another_one(num_before: int) -> None:
    """From no state and from some, with the state that is left."""
    torch.manual_seed(0)
    case = make_states_case([40], [num_before], every=1000)
    qkvz, ba, net, state = make_inputs(case, (2, 4, 8, 12), torch.float32)
    row, before = int(case.step.rows[0]), copy(state)
    mixed, z = qkvz.split([net.conv_weight.shape[1], net.num_value_heads * net.value_dim], dim=1)
    parts = heads(conv_silu_reference(mixed, net.conv_weight, None, before.conv, case.step), ba, net)
    q, k, v, alpha, beta = (part.unsqueeze(0) for part in parts)
    found, left = naive.naive_recurrent_gated_delta_rule(
        q=q, k=k, v=v, beta=beta, g=alpha.log(), scale=1.0,
        initial_state=before.matrices[row : row + 1] if num_before else None, output_final_state=True,
    )  # fmt: skip
    out = delta_net_reference(qkvz, ba, net, state, case.step)
    torch.testing.assert_close(out, gated_norm(found[0], z, net), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.matrices[row], left[0], rtol=1e-4, atol=1e-4)
