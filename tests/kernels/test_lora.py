"""What the two products of adapters mean, beside each row's own formula."""

import torch

from nanovllm.kernels.lora import adapter_rows, expand, shrink
from nanovllm.kernels.silu_and_mul import silu_and_mul_reference


def test_each_row_gets_what_its_own_adapter_adds() -> None:
    torch.manual_seed(0)
    num_slots, rank, inputs, sizes = 3, 4, 10, (6, 6)
    x, outputs = torch.randn(7, inputs), torch.randn(7, 12)
    a, b, bias = torch.randn(num_slots, 2 * rank, inputs), torch.randn(num_slots, 12, rank), torch.randn(num_slots, 12)
    slots = torch.tensor([2, 3, 0, 2, 3, 1, 0], dtype=torch.int32)
    want = outputs.clone()
    for row, slot in enumerate(slots.tolist()):
        if slot < num_slots:
            first, second = (b[slot, i * 6 : (i + 1) * 6] @ a[slot, i * rank : (i + 1) * rank] @ x[row] for i in (0, 1))
            want[row] += torch.cat((first, second)) + bias[slot]
    rows = adapter_rows(slots, num_slots)
    shrunk = shrink(x, a, rows)
    got = expand(outputs.clone(), shrunk, b, bias, sizes, rows)
    torch.testing.assert_close(got, want)
    assert torch.equal(got[[1, 4]], outputs[[1, 4]]), "rows without an adapter keep their bits"
    gated = expand(outputs.clone(), shrunk, b, bias, sizes, rows, activation="silu")
    torch.testing.assert_close(gated, silu_and_mul_reference(want))
