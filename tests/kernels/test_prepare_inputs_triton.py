"""The Triton step preparation against its reference."""

import torch

from nanovllm.kernels.prepare_inputs import prepare_inputs_reference
from tests.kernels.twins import DEVICE, load_twin, twin_test

twin = load_twin("prepare_inputs")
pytestmark = twin_test


def check(rows: list[int], query_lens: list[int], block_size: int = 16) -> None:
    generator = torch.Generator().manual_seed(len(rows))
    num_rows, num_tokens = 9, sum(query_lens)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32).to(DEVICE)

    query_start_loc = torch.tensor([0, *query_lens]).cumsum(0).int().to(DEVICE)
    token_ids = integers(-1, 3, num_tokens)
    last_token, num_computed = integers(0, 1000, num_rows), integers(0, 200, num_rows)
    tables = integers(0, 10_000, num_rows, -(-(200 + max(query_lens)) // block_size))
    args = torch.tensor(rows, dtype=torch.int32, device=DEVICE), query_start_loc, token_ids, last_token
    computed, want_computed = num_computed.clone(), num_computed.clone()
    got = twin.prepare_inputs_triton(*args, computed, tables, block_size)
    want = prepare_inputs_reference(*args, want_computed, tables, block_size)
    assert torch.equal(computed, want_computed)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one.long(), other.long())


def test_decodes_with_padding_rows() -> None:
    check([4, 0, 8, -1, 3, -1], [1] * 6)


def test_mixed_batch() -> None:
    check([1, 5, 0, 2], [1, 1, 37, 1100])


def test_one_token() -> None:
    check([7], [1], block_size=64)
