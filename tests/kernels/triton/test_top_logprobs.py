"""Log-probabilities by Triton against the PyTorch form, which its own tests compare with NumPy."""

import pytest
import torch

from nanovllm.sampling.logprobs import packed, top_logprobs
from tests.kernels.twins import DEVICE, DTYPES, load_twin, twin_test

twin = load_twin("top_logprobs")
pytestmark = twin_test


def check(logits: torch.Tensor, tokens: list[int], members: list[int], k: int) -> None:
    index = torch.tensor(members)
    want = packed(top_logprobs(logits[index], torch.tensor(tokens)[index], k))
    got = twin.top_logprobs_triton(
        logits.to(DEVICE), torch.tensor(tokens, dtype=torch.int32, device=DEVICE), index.to(DEVICE), k
    ).cpu()
    assert got.shape == want.shape and got.dtype == torch.int32
    assert torch.equal(got[..., 0], want[..., 0]) and torch.equal(got[..., 2], want[..., 2])
    torch.testing.assert_close(
        got[..., 1].contiguous().view(torch.float32),
        want[..., 1].contiguous().view(torch.float32),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 5])
def test_rows_are_those_of_torch(dtype: torch.dtype, k: int) -> None:
    """Ties everywhere, parts of less than a whole one, rows in another order, and one of them left out."""
    logits = (torch.randn(4, 9000, generator=torch.Generator().manual_seed(k)) * 8).round().to(dtype) / 4
    logits[2, 100:] = -torch.inf
    check(logits, [3, 8999, 50, 4096], [3, 0, 2], k)


def test_a_vocabulary_smaller_than_what_is_asked_in_each_part() -> None:
    logits = torch.tensor([[0.0, -0.0, 1.0, -torch.inf, 1.0]])
    check(logits, [1], [0], 5)


def test_nobody() -> None:
    empty = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert twin.top_logprobs_triton(torch.zeros(2, 8, device=DEVICE), empty.int(), empty, 2).shape == (0, 3, 3)
