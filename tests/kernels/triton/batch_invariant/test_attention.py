from dataclasses import replace

import pytest
import torch

from nanovllm.attention.batch_invariant import BatchInvariantBackend, cpp_or_reference
from nanovllm.kernels.attention_types import LayerCache
from tests.attention.paged_cases import make_case
from tests.kernels.twins import DEVICE, DTYPES, TOLERANCE, load_twin, relative_error, twin_test

pytestmark = twin_test
twin = load_twin("batch_invariant.attention")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("window", "softcap", "block_size", "head_dim"), [(None, None, 8, 16), (11, None, 64, 24), (None, 5.0, 8, 16)]
)
def test_twin_equals_the_reference_and_a_token_is_the_same_in_any_batch(
    dtype: torch.dtype, window: int | None, softcap: float | None, block_size: int, head_dim: int
) -> None:
    """To the bit: a whole prompt against its tokens one by one, and beside others."""
    case = make_case([1, 1, 5, 17], [40, 3, 40, 17], dtype=dtype, block_size=block_size, head_dim=head_dim)
    reference = BatchInvariantBackend(cpp_or_reference(None))
    shape = case.shape(0.3, window, softcap)
    expected = reference.forward(shape, case.q, case.cache, reference.prepare(case.meta))
    table = case.meta.block_table.repeat_interleave(torch.tensor([1, 1, 5, 17]), 0).to(DEVICE)
    lens = torch.tensor([40, 3, *range(36, 41), *range(1, 18)], dtype=torch.int32, device=DEVICE)
    q, cache = case.q.to(DEVICE), LayerCache(case.kv_cache.to(DEVICE))
    meta = replace(case.meta, block_table=table, seq_lens=lens)
    out = twin.batch_invariant_attention_triton(q, cache, meta, shape)
    assert relative_error(out.cpu(), expected) < TOLERANCE[dtype]
    for token in (0, 1, 6, 22):
        part = slice(token, token + 1)
        one = replace(meta, block_table=table[part], seq_lens=lens[part])
        alone = twin.batch_invariant_attention_triton(q[part], cache, one, shape)
        assert torch.equal(alone[0], out[token])
    lens[3] = 0
    out = twin.batch_invariant_attention_triton(q, cache, meta, shape)
    assert not out[3].any(), "padding"
