"""The stage of grammars against bits that NumPy reads one by one."""

import numpy as np
import pytest
import torch

from nanovllm.sampling.stages.grammar import apply_bitmask


def reference(logits: np.ndarray, words: np.ndarray) -> np.ndarray:
    result = np.full_like(logits, -np.inf)
    for row in range(logits.shape[0]):
        allowed = [i for i in range(logits.shape[1]) if int(words[row, i // 32]) >> (i % 32) & 1]
        result[row, allowed] = logits[row, allowed]
        if allowed and np.isneginf(logits[row, allowed]).all():
            result[row, allowed] = 0.0
    return result


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 64, 1000])
@pytest.mark.parametrize("extra_words", [0, 2])
def test_only_allowed_tokens_keep_their_logits(vocab_size: int, extra_words: int) -> None:
    """Also where the mask is longer than the vocabulary, and in words whose highest bit is the sign."""
    rng = np.random.default_rng(vocab_size)
    logits = rng.normal(size=(9, vocab_size)).astype(np.float32)
    logits[rng.random(logits.shape) < 0.3] = -np.inf
    words = rng.integers(-(2**31), 2**31, (9, -(-vocab_size // 32) + extra_words)).astype(np.int32)
    words[0], words[1] = -1, 1
    before = logits.copy()
    result = apply_bitmask(torch.from_numpy(logits), torch.from_numpy(words)).numpy()
    np.testing.assert_array_equal(result, reference(logits, words))
    np.testing.assert_array_equal(logits, before)


def test_the_grammar_has_the_last_word() -> None:
    """Where others ruled out all that it allows, the allowed tokens are equally likely; else nothing is revived."""
    logits = torch.tensor([[1.0, -torch.inf, -torch.inf, 2.0], [-torch.inf, 1.0, 3.0, -torch.inf]])
    words = torch.tensor([[0b0110], [0b0011]], dtype=torch.int32)
    expected = [[-np.inf, 0.0, 0.0, -np.inf], [-np.inf, 1.0, -np.inf, -np.inf]]
    np.testing.assert_array_equal(apply_bitmask(logits, words).numpy(), np.array(expected, dtype=np.float32))
