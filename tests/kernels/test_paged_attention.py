"""The first link of the chain of trust: the paged reference equals `scaled_dot_product_attention` on unpaged data."""

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels.paged_attention import paged_attention_reference
from tests.attention.paged_cases import LAYOUTS, PagedCase, make_case, make_metadata


def unpaged(case: PagedCase, scale: float, window: int | None, softcap: float | None = None) -> torch.Tensor:
    """Attention of each request over its own keys and values, with a mask written cell by cell."""
    outputs, start = [], 0
    for context, query_len, seq_len in zip(
        case.contexts, case.meta.query_lens_host, case.meta.seq_lens_host, strict=True
    ):
        q = case.q[start : start + query_len].transpose(0, 1)
        start += query_len
        keys, values = context.repeat_interleave(q.shape[0] // context.shape[1], dim=1)
        mask = torch.zeros(query_len, seq_len, dtype=torch.bool)
        for j in range(query_len):
            position = seq_len - query_len + j
            first = 0 if window is None else max(0, position - window + 1)
            mask[j, first : position + 1] = True
        if softcap is not None:
            scores = softcap * torch.tanh(q @ keys.transpose(1, 2) * scale / softcap)
            weights = torch.softmax(scores.where(mask, float("-inf")), dim=-1)
            outputs.append((weights @ values).transpose(0, 1))
            continue
        outputs.append(F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 1, 5, 1000])
def test_mixed_batch(layout: str, window: int | None) -> None:
    case = make_case([1, 1, 1, 4, 17, 2], [1, 9, 30, 4, 40, 8], layout=layout)
    out = paged_attention_reference(case.q, case.cache, case.meta, case.shape(0.3, window))
    torch.testing.assert_close(out, unpaged(case, 0.3, window), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_soft_cap(window: int | None) -> None:
    case = make_case([1, 1, 4, 17], [1, 9, 4, 40])
    out = paged_attention_reference(case.q, case.cache, case.meta, case.shape(0.7, window, 1.5))
    torch.testing.assert_close(out, unpaged(case, 0.7, window, 1.5), atol=2e-6, rtol=1e-5)
    loose = paged_attention_reference(case.q, case.cache, case.meta, case.shape(0.7, window, 1e4))
    torch.testing.assert_close(loose, unpaged(case, 0.7, window), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 5])
def test_a_sink_is_a_key_without_a_value(window: int | None) -> None:
    """Of its weight alone the others lack something; far below the scores it changes nothing."""
    case, sinks = make_case([1, 1, 4, 17], [1, 9, 4, 40]), torch.linspace(-2, 3, 6)
    got = paged_attention_reference(case.q, case.cache, case.meta, case.shape(0.7, window), sinks)
    start = 0
    for i, (keys, values) in enumerate(context.repeat_interleave(3, 1).double() for context in case.contexts):
        query_len, seq_len = case.meta.query_lens_host[i], case.meta.seq_lens_host[i]
        for position, q in enumerate(case.q[start : start + query_len].double(), seq_len - query_len):
            seen = slice(0 if window is None else max(0, position - window + 1), position + 1)
            weights = ((keys[:, seen] @ q[:, :, None]).squeeze(2) * 0.7).exp()
            want = (weights[:, None] @ values[:, seen]).squeeze(1) / (weights.sum(1) + sinks.double().exp())[:, None]
            torch.testing.assert_close(got[start].double(), want, atol=1e-5, rtol=1e-5)
            start += 1
    far = paged_attention_reference(case.q, case.cache, case.meta, case.shape(0.7, window), torch.full((6,), -1e4))
    torch.testing.assert_close(far, unpaged(case, 0.7, window), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 64), (7, 1, 80), (14, 2, 96), (4, 4, 128)])
def test_head_shapes(heads: int, kv_heads: int, dim: int) -> None:
    case = make_case([1, 3], [12, 5], num_heads=heads, num_kv_heads=kv_heads, head_dim=dim)
    out = paged_attention_reference(case.q, case.cache, case.meta, case.shape(dim**-0.5))
    torch.testing.assert_close(out, unpaged(case, dim**-0.5, None), atol=2e-6, rtol=1e-5)


def test_bfloat16_rounds_once() -> None:
    """Scores and weights stay in float32: the result is that of float32 data, rounded."""
    case = make_case([1, 6], [20, 6], dtype=torch.bfloat16)
    exact = PagedCase(case.q.float(), case.kv_cache.float(), case.meta, [c.float() for c in case.contexts])
    out = paged_attention_reference(case.q, case.cache, case.meta, case.shape(0.25))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), unpaged(exact, 0.25, None), atol=1e-2, rtol=1e-2)


def test_padding_gives_zeros() -> None:
    """A request of length 0 (padding of a captured batch) is finite and leaves the others alone."""
    case = make_case([1], [10])
    table = torch.cat((case.meta.block_table, torch.zeros_like(case.meta.block_table)))
    padded = make_metadata([1, 1], [10, 0], table, torch.tensor([*case.meta.slot_mapping.tolist(), -1]))
    out = paged_attention_reference(torch.cat((case.q, case.q)), case.cache, padded, case.shape(0.25))
    assert torch.equal(out[:1], paged_attention_reference(case.q, case.cache, case.meta, case.shape(0.25)))
    assert not out[1].any()


def test_strided_queries() -> None:
    case = make_case([1, 3], [7, 9])
    wide = torch.cat((case.q, torch.randn(4, 2, 16)), dim=1)
    out = paged_attention_reference(wide[:, :6], case.cache, case.meta, case.shape(0.25))
    assert torch.equal(out, paged_attention_reference(case.q, case.cache, case.meta, case.shape(0.25)))
