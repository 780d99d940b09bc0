import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.sampling.buckets import apply_top_p_by_buckets
from nanovllm.sampling.logits import (
    apply_min_p,
    apply_temperature,
    apply_top_k,
    apply_top_p,
    find_candidates,
    pick_by_weight,
    pick_highest,
)
from tests.sampling.reference import keep_min_p, keep_top_k, keep_top_p

INF = math.inf
WIDTHS = [1, 2, 5, 31, 127, 128, 129, 255, 256, 257, 1000]


def make_logits(seed: int, num_rows: int, width: int, kind: str) -> torch.Tensor:
    """Rows with and without ties, peaked or flat, some with tokens already masked."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, width, generator=generator) * 3
    if kind == "ties":
        logits = (logits * 2).round() / 2
    elif kind == "bf16":
        logits = logits.bfloat16().float()
    elif kind == "flat":
        logits = torch.zeros_like(logits)
    elif kind == "masked":
        logits[torch.rand(num_rows, width, generator=generator) < 0.5] = -INF
        logits[:, seed % width] = 1.0
    return logits


kinds = st.sampled_from(["plain", "ties", "bf16", "flat", "masked"])
batches = st.builds(make_logits, st.integers(0, 2**31), st.integers(1, 4), st.sampled_from(WIDTHS), kinds)
property_test = settings(derandomize=True, deadline=None, max_examples=80)


def kept(logits: torch.Tensor, filtered: torch.Tensor) -> np.ndarray:
    """Which tokens a filter left; it must not change the others, and a masked token stays masked."""
    keep = filtered != -INF
    assert torch.equal(filtered[keep], logits[keep])
    return keep.numpy()


@property_test
@given(batches, st.data())
def test_min_p_agrees_with_numpy(logits: torch.Tensor, data: st.DataObject) -> None:
    min_p = [data.draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0])) for _ in logits]
    keep = kept(logits, apply_min_p(logits, torch.tensor(min_p)))
    for row, p, got in zip(logits.double().numpy(), min_p, keep, strict=True):
        finite = row > -INF
        assert not (got & ~keep_min_p(row, p * (1 - 1e-5))).any()
        assert not (finite & keep_min_p(row, p * (1 + 1e-5) if p < 1 else 1.0) & ~got).any()


@property_test
@given(batches, st.data())
def test_top_k_agrees_with_numpy(logits: torch.Tensor, data: st.DataObject) -> None:
    """Ties with the k-th token stay; 0 and k >= V keep all."""
    top_k = [data.draw(st.integers(0, logits.shape[1] + 2)) for _ in logits]
    keep = kept(logits, apply_top_k(logits, torch.tensor(top_k, dtype=torch.int32), max(top_k)))
    for row, k, got in zip(logits.numpy(), top_k, keep, strict=True):
        assert np.array_equal(got, keep_top_k(row, k) & (row > -INF))


@property_test
@given(batches, st.data())
@pytest.mark.parametrize("apply", [apply_top_p, apply_top_p_by_buckets])
def test_top_p_agrees_with_numpy(apply, logits: torch.Tensor, data: st.DataObject) -> None:  # type: ignore[no-untyped-def]
    """The shortest prefix that reaches p, lower ids first among equals, at least one token."""
    top_p = [data.draw(st.sampled_from([1e-30, 0.1, 0.5, 0.9, 0.95, 0.9999, 1.0])) for _ in logits]
    keep = kept(logits, apply(logits, torch.tensor(top_p)))
    for row, p, got in zip(logits.double().numpy(), top_p, keep, strict=True):
        finite = row > -INF
        low, high = (keep_top_p(row, min(1.0, p * scale)) & finite for scale in (1 - 1e-6, 1 + 1e-6))
        order = np.argsort(-row, kind="stable")
        assert got.any()
        assert low.sum() <= got.sum() <= high.sum()
        assert got[order[: got.sum()]].all()


@pytest.mark.parametrize("apply", [apply_top_p, apply_top_p_by_buckets])
def test_top_p_edges(apply) -> None:  # type: ignore[no-untyped-def]
    """Exactly reached stops; too small a p for float32 keeps the first token; a masked row does not raise."""
    flat = torch.zeros(3, 4)
    assert (apply(flat, torch.tensor([0.5, 0.500001, 0.0])) != -INF).sum(-1).tolist() == [2, 3, 1]
    assert (apply(flat, torch.full((3,), 0.5))[0] != -INF).tolist() == [True, True, False, False]
    apply(torch.full((1, 4), -INF), torch.tensor([0.5]))
    apply(torch.full((1, 4), math.nan), torch.tensor([0.5]))


def test_top_p_counts_the_weight_outside() -> None:
    """Candidates alone give what the whole row gives, if the rest's weight is passed along."""
    logits = make_logits(3, 5, 1000, "plain")
    values, ids = find_candidates(logits, 400)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    outside = weights.sum(-1) - weights.gather(1, ids).sum(-1)
    top_p = torch.full((5,), 0.8)
    whole = apply_top_p(logits, top_p)
    assert torch.equal(whole.gather(1, ids), apply_top_p(values, top_p, outside))
    assert torch.equal((whole != -INF).sum(-1), (apply_top_p(values, top_p, outside) != -INF).sum(-1))


@pytest.mark.parametrize(("vocab_size", "width"), [(1, 1), (200, 128), (1000, 7), (1024, 8), (2048, 16), (16384, 128)])
@pytest.mark.parametrize("kind", ["plain", "ties", "masked", "flat"])
def test_candidates_are_the_highest(vocab_size: int, width: int, kind: str) -> None:
    logits = make_logits(1, 3, vocab_size, kind)
    values, ids = find_candidates(logits, width)
    assert torch.equal(values, logits.gather(1, ids))
    assert (ids.diff(dim=-1) > 0).all()
    assert torch.equal(values.sort(-1, descending=True).values, logits.topk(width, dim=-1).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_pick_highest_is_argmax(width: int, dtype: torch.dtype) -> None:
    """The lowest id on a tie, also across blocks; all masked is id 0."""
    for kind in ("plain", "ties", "flat", "masked"):
        logits = make_logits(width, 6, width, kind).to(dtype)
        assert pick_highest(logits).tolist() == logits.float().numpy().argmax(-1).tolist()
    assert pick_highest(torch.full((2, width), -INF)).tolist() == [0, 0]


@property_test
@given(batches, st.integers(0, 2**24 - 1))
def test_pick_by_weight_inverts_the_cdf(logits: torch.Tensor, numerator: int) -> None:
    weights = logits.softmax(-1)
    u = numerator / 2**24
    picked = pick_by_weight(weights, torch.full((len(logits),), u)).numpy()
    for row, token in zip(weights.double().numpy(), picked, strict=True):
        reached = row.cumsum()
        below = reached[token] - row[token]
        assert row[token] > 0
        assert below - 1e-6 <= u * reached[-1] <= reached[token] + 1e-6


@pytest.mark.parametrize("width", WIDTHS)
def test_pick_by_weight_skips_weight_zero(width: int) -> None:
    """The ends of [0, 1) give the first and the last token that can be drawn at all."""
    weights = torch.zeros(2, width)
    weights[:, width // 3], weights[:, width // 2] = 0.3, 0.7
    assert pick_by_weight(weights, torch.tensor([0.0, 1 - 2**-24])).tolist() == [width // 3, width // 2]


def test_pick_by_weight_of_nothing_stays_in_range() -> None:
    for value in (0.0, math.nan, INF):
        picked = pick_by_weight(torch.full((3, 300), value), torch.tensor([0.0, 0.5, 0.99]))
        assert ((picked >= 0) & (picked < 300)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_temperature_divides_in_float32(dtype: torch.dtype) -> None:
    logits = make_logits(0, 2, 50, "plain").to(dtype)
    scaled = apply_temperature(logits, torch.tensor([0.7, 1e4]))
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled, logits.float() / torch.tensor([[0.7], [1e4]]))
