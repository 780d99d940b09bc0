"""A KV cache in 8 bits: what is read is near what was stored, and the same whoever stored it."""

import pytest
import torch

from nanovllm.kernels.attention_types import AttentionShape, HeadInputs, LayerCache
from nanovllm.kernels.cache_codes import CODES, LARGEST, cells, encode
from nanovllm.kernels.qkv_rope_store import qkv_rope_store_reference

ERROR = {torch.float8_e4m3fn: 0.032, torch.int8: 1 / 250}  # of a number that is near the largest of its row


@pytest.mark.parametrize("dtype", LARGEST)
def test_codes_stand_for_the_numbers(dtype: torch.dtype) -> None:
    rows = torch.randn(6, 64) * torch.tensor([1, 1e-12, 1e30, 3e-3, 40, 448]).view(6, 1)
    codes, scales = encode(rows, dtype)
    assert codes.dtype == dtype and codes.shape == rows.shape and scales.dtype == torch.bfloat16
    largest = rows.abs().amax(-1, keepdim=True)
    error = (codes.float() * scales.float()[:, None] - rows).abs() / largest
    assert error.max() < ERROR[dtype]
    assert ((codes.float().abs() <= LARGEST[dtype]) & (codes.float().abs().amax(-1, keepdim=True) > 60)).all()
    # Each by itself gives the same bits.
    again = [encode(row, dtype) for row in rows]
    assert all(torch.equal(scales[i], scale) for i, (_, scale) in enumerate(again))
    assert all(torch.equal(codes[i].float(), code.float()) for i, (code, _) in enumerate(again))


def test_the_largest_number_of_a_row_is_exact_in_e4m3() -> None:
    """It is often most of the row: where it is a bfloat16, nothing of it is lost."""
    rows = (torch.randn(50, 16) * torch.logspace(-6, 6, 50)[:, None]).bfloat16().float()
    codes, scales = encode(rows, torch.float8_e4m3fn)
    largest = rows.abs().argmax(1, keepdim=True)
    numbers = codes.float() * scales.float()[:, None]
    assert torch.equal(numbers.gather(1, largest), rows.gather(1, largest))
    assert torch.equal(codes.float(), (rows / scales.float()[:, None]).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", LARGEST)
def test_rows_of_zeros_and_rows_that_are_no_numbers(dtype: torch.dtype) -> None:
    rows = torch.randn(4, 16)
    rows[0], rows[1, 3], rows[2, 5] = 0, float("inf"), float("nan")
    codes, scales = encode(rows, dtype)
    numbers = codes.float() * scales.float()[:, None]
    assert not numbers[0].any() and scales[0] > 0
    assert not numbers[1:3].isfinite().any()
    assert numbers[3].isfinite().all()


@pytest.mark.parametrize("kind", CODES)
def test_what_is_stored_is_read(kind: str) -> None:
    shape, slots = AttentionShape(6, 2, 8, scale=1.0), torch.tensor([3, -1, 19, 0])
    qkv = torch.randn(4, 10 * 8)
    data = torch.zeros(2, 5, 2, 4, 8).to(CODES[kind])
    cache = LayerCache(data, torch.zeros(5, 2, 4, 2, dtype=torch.bfloat16))
    qkv_rope_store_reference(qkv, HeadInputs(None, slots), cache, shape)
    want = torch.zeros(2, 5, 2, 4, 8)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            want[:, slot // 4, :, slot % 4] = qkv[token].view(10, 8)[6:].view(2, 2, 8)
    got = cells(cache, torch.arange(5))
    torch.testing.assert_close(got, want, atol=want.abs().max() * ERROR[CODES[kind]], rtol=0)
    assert torch.equal(got, cells(cache, slice(0, 5)))
    assert torch.equal(got[:, [4, 0]].transpose(1, 2), cells(cache, torch.tensor([4, 0]), heads_first=True))
    assert not cache.scales[0, :, 1:3].any(), "wrote a cell that nobody named"
