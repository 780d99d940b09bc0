"""Log-probabilities and ranks against NumPy, at sizes that are one chunk and several."""

import numpy as np
import pytest
import torch

from nanovllm.sampling import logprobs
from nanovllm.sampling.logits import CHUNK
from nanovllm.sampling.logprobs import top_logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "vocab_size", "k"), [(1, 1, 1), (5, 40, 0), (7, 40, 40), (9, 1000, 3), (4, 1024, 3), (1, 1024, 32)]
)
@pytest.mark.parametrize("chunk", [2**21, 2000])
def test_values_and_ranks(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, n: int, vocab_size: int, k: int, chunk: int
) -> None:
    """Raw, in float32, over the whole vocabulary; tokens that tie share the better rank (bfloat16 ties a lot)."""
    monkeypatch.setitem(CHUNK, "cpu", chunk)
    generator = torch.Generator().manual_seed(n)
    logits = (torch.randn(n, vocab_size, generator=generator) * 4).to(dtype)
    tokens = torch.randint(vocab_size, (n,), generator=generator).int()
    top = top_logprobs(logits, tokens, k)
    assert [column.shape for column in top] == [(n, 1 + k)] * 3
    for row in range(n):
        x = logits[row].double().numpy()
        expected = x - x.max() - np.log(np.exp(x - x.max()).sum())
        ids = top.token_ids[row].numpy()
        assert ids[0] == tokens[row] and len(set(ids[1:])) == k
        np.testing.assert_allclose(top.logprobs[row].numpy(), expected[ids], atol=1e-5)
        assert top.ranks[row].tolist() == [1 + int((x > x[token]).sum()) for token in ids]
        assert ids[1:].tolist() == np.argsort(-x, kind="stable")[:k].tolist(), "falling, ties by id"


@pytest.mark.parametrize("k", [0, 5, 40_000])
def test_memory_on_the_way_is_bounded_whatever_is_asked(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    """A whole vocabulary's log-probabilities take many times the logits while they are sorted."""
    sizes = []
    of_chunk = logprobs._of_chunk

    def watched(logits: torch.Tensor, own_ids: torch.Tensor, k: int, as_logits: bool) -> logprobs.TopLogprobs:
        sizes.append(logits.shape[0] * (logits.shape[1] + 8 * k))
        return of_chunk(logits, own_ids, k, as_logits)

    monkeypatch.setattr(logprobs, "_of_chunk", watched)
    logits = torch.randn(60, 40_000)
    assert top_logprobs(logits, logits.argmax(-1), k).token_ids.shape == (60, 1 + k)
    assert max(sizes) <= CHUNK["cpu"]
