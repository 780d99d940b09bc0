"""Each stage that edits single logits, against the same thing one token at a time."""

import numpy as np
import pytest
import torch

from nanovllm.sampling.stages.allowed_tokens import allow_only
from nanovllm.sampling.stages.logit_bias import add_bias
from nanovllm.sampling.stages.penalties import apply_penalties
from nanovllm.sampling.stages.stage import rule_out

N, V = 4, 30


@pytest.fixture
def logits() -> torch.Tensor:
    values = torch.randn(N, V, generator=torch.Generator().manual_seed(0)) * 3
    values[1, 5] = -np.inf
    return values


def pairs(*lists: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    index = [i for i, ids in enumerate(lists) for _ in ids]
    return torch.tensor(index), torch.tensor([token for ids in lists for token in ids])


def test_allow_only_keeps_these_tokens_and_rows_that_do_not_ask(logits: torch.Tensor) -> None:
    before = logits.clone()
    result = allow_only(logits, *pairs([3, 29], [5, 6], [], [0])).numpy()
    assert np.array_equal(np.isfinite(result).sum(1), [2, 1, V, 1])
    for row, token in ((0, 3), (0, 29), (1, 6), (3, 0)):
        assert result[row, token] == before[row, token]
    assert np.array_equal(result[2], before[2])
    assert torch.equal(logits, before), "pure"


def test_rule_out_takes_these_tokens_away(logits: torch.Tensor) -> None:
    expected = logits.numpy().copy()
    expected[0, [1, 2]], expected[3, 29] = -np.inf, -np.inf
    assert np.array_equal(rule_out(logits, *pairs([1, 2], [], [], [29])).numpy(), expected)


def test_add_bias_leaves_what_is_ruled_out(logits: torch.Tensor) -> None:
    expected = logits.numpy().copy()
    expected[0, 7] += np.float32(2.5)
    expected[2, 0] -= np.float32(100)
    result = add_bias(logits, *pairs([7], [5], [0]), torch.tensor([2.5, 10.0, -100.0]))
    assert np.array_equal(result.numpy(), expected)
    assert result[1, 5] == -np.inf


def test_penalties_count_prompt_and_output_as_each_says(logits: torch.Tensor) -> None:
    """Repetition looks at both, frequency and presence at the output; 1, 0, 0 change nothing, to the bit."""
    rng = np.random.default_rng(0)
    in_prompt, times = rng.integers(0, 2, (N, V)), rng.integers(0, 3, (N, V))
    repetition, frequency, presence = (
        np.float32([1.0, 1.3, 0.7, 2.0]),
        np.float32([0, 0.5, 0, -2]),
        np.float32([0, 0, 1.5, 2]),
    )
    expected = logits.numpy().astype(np.float64)
    for row in range(N):
        for token in range(V):
            if in_prompt[row, token] or times[row, token]:
                factor = float(repetition[row])
                expected[row, token] *= 1 / factor if expected[row, token] > 0 else factor
            expected[row, token] -= frequency[row] * times[row, token] + presence[row] * (times[row, token] > 0)
    counts = torch.from_numpy(2 * times + in_prompt).int()
    result = apply_penalties(logits, counts, *map(torch.from_numpy, (repetition, frequency, presence)))
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(result[0], logits[0])
