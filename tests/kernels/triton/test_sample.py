"""The Triton sampler against the PyTorch one, which its own tests compare with NumPy."""

import itertools
import math

import numpy as np
import pytest
import torch

from nanovllm.sampling.draw_columns import ROW, DrawColumns
from nanovllm.sampling.sampler import Sampler
from nanovllm.sampling_params import SamplingParams
from tests.kernels.twins import DEVICE, INTERPRETED, in_each_dtype, load_twin, twin_test
from tests.sampling.reference import filtered_probabilities
from tests.sampling.requests import sampled

twin = load_twin("sample")
pytestmark = twin_test

INF = math.inf
MIXED: list[dict[str, float]] = [
    {"temperature": 0},
    {"temperature": 0.8},
    {"top_k": 5},
    {"top_p": 0.9, "temperature": 0.6},
    {"min_p": 0.05},
    {"top_k": 40, "top_p": 0.8, "temperature": 1.5},
    {"top_p": 0.999, "temperature": 3.0},
    {"top_k": 300},
    {"min_p": 1e-4, "top_p": 0.99, "temperature": 2.0},
    {"min_p": 0.02, "top_k": 200, "top_p": 0.95},
    {"min_p": 1.0},
    {"top_k": 1},
    {"top_p": 1e-30},
    {"temperature": 1e-4},
    {"temperature": 1e4, "top_p": 0.5},
]


def make_state(options: list[dict[str, float]], vocab_size: int, seeds: list[int]) -> DrawColumns:
    state = DrawColumns(len(options), vocab_size, "cpu")
    for row, (option, seed) in enumerate(zip(options, seeds, strict=True)):
        state.set_row(row, SamplingParams(**option), seed)  # type: ignore[arg-type]
    return state


def draw(logits: torch.Tensor, state: DrawColumns, rows: list[int], positions: list[int]) -> list[int]:
    """Also checks that each row's token is left in `last_token`, and that no other row's is touched."""
    arrays = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (rows, positions))
    last_token = torch.full_like(state.last_token, -7, device=DEVICE)
    tokens = twin.sample_triton(logits.to(DEVICE), *arrays, state.upload().to(DEVICE), last_token)
    assert tokens.dtype == torch.int32
    drawn: dict[int, set[int]] = {row: {-7} for row in range(len(last_token)) if row not in rows}
    for row, token in zip(rows, tokens.tolist(), strict=True):
        drawn.setdefault(row, set()).add(token)
    assert all(token in drawn[row] for row, token in enumerate(last_token.tolist()))
    return tokens.tolist()


def draw_by_torch(logits: torch.Tensor, state: DrawColumns, rows: list[int], positions: list[int]) -> list[int]:
    sampler = Sampler(len(state.host), logits.shape[1], "cpu")
    sampler.columns = state
    return sampler.sample(logits, sampled(rows, positions)).tolist()


def make_logits(seed: int, num_rows: int, vocab_size: int, kind: str, dtype: torch.dtype) -> torch.Tensor:
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    if kind == "ties":
        logits = (logits * 2).round() / 2
    elif kind == "flat":
        logits = torch.zeros_like(logits)
    elif kind == "masked":
        logits[torch.rand(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed + 1)) < 0.5] = -INF
        logits[:, seed % vocab_size] = 1.0
    elif kind == "negative":
        logits -= 50
    return logits.to(dtype)


def test_columns_are_where_the_state_puts_them() -> None:
    fields = {"temperature": "TEMPERATURE", "min_p": "MIN_P", "top_p": "TOP_P", "top_k": "TOP_K", "seed": "SEED_LOW"}
    for field, name in fields.items():
        assert ROW.fields is not None
        assert ROW.fields[field][1] == 4 * getattr(twin, name).value
    assert twin.SEED_HIGH.value == twin.SEED_LOW.value + 1


@pytest.mark.parametrize(
    ("vocab_size", "kind", "dtype"),
    in_each_dtype(
        [
            (5003, "ties"),
            (5003, "plain"),
            *itertools.product([1, 5, 64], ["plain", "ties"]),
            *itertools.product([300], ["plain", "masked"]),
            *itertools.product([1000], ["plain", "ties", "flat", "masked", "negative"]),
        ]
    ),
)
def test_mixed_batches_draw_what_torch_draws(vocab_size: int, kind: str, dtype: torch.dtype) -> None:
    """Greedy, sampled and filtered rows side by side, the same token in each."""
    n = len(MIXED)
    logits = make_logits(vocab_size, n, vocab_size, kind, dtype)
    state = make_state(MIXED, vocab_size, [i * 7919 - 5 for i in range(n)])
    rows, positions = list(range(n)), [3 + 11 * i for i in range(n)]
    assert draw(logits, state, rows, positions) == draw_by_torch(logits, state, rows, positions)


def test_rows_do_not_depend_on_their_batch() -> None:
    """Any subset in any order, beside padding, and with another row stride, gives each row the same token."""
    n, vocab_size = len(MIXED), 1000
    logits = make_logits(0, n, vocab_size, "plain", torch.float32)
    state = make_state(MIXED, vocab_size, list(range(n)))
    positions = [5 + i for i in range(n)]
    together = draw(logits, state, list(range(n)), positions)
    order = [7, 3, 9, 0, 5, 8]
    wide = torch.full((8, 1111), math.nan)
    wide[[0, 1, 3, 4, 5, 7], :vocab_size] = logits[order]
    rows = [7, 3, -1, 9, 0, 5, -1, 8]
    apart = draw(wide.to(DEVICE)[:, :vocab_size], state, rows, [positions[row] if row >= 0 else 0 for row in rows])
    assert apart == [together[row] if row >= 0 else 0 for row in rows]


def test_padding_alone() -> None:
    """Nothing but padding, as when a graph is captured; and no row at all."""
    state = make_state([{}], 300, [1])
    assert draw(torch.full((2, 300), math.nan), state, [-1, -1], [0, 0]) == [0, 0]
    assert draw(torch.zeros(0, 300), state, [], []) == []


@pytest.mark.parametrize("options", MIXED)
def test_odd_logits(options: dict[str, float]) -> None:
    """Huge and masked logits give the only sane token; infinities and NaN give an id in range."""
    state = make_state([options], 300, [1])
    huge = torch.full((1, 300), -1e30)
    huge[0, 150] = 1e30
    masked = torch.full((1, 300), -INF)
    masked[0, 290] = -3.0
    assert draw(huge, state, [0], [1]) == [150]
    assert draw(masked, state, [0], [1]) == [290]
    partly = torch.zeros(1, 300)
    partly[0, 200] = math.nan
    for logits in (partly, *(torch.full((1, 300), value) for value in (-INF, INF, math.nan))):
        assert 0 <= draw(logits, state, [0], [1])[0] < 300


def test_ties_of_greedy_and_filters() -> None:
    """Greedy takes the lowest id; top_k keeps all that tie with the k-th, top_p only the first of them."""
    n = 12
    logits = torch.zeros(n, 500)
    options: list[dict[str, float]] = [{"temperature": 0}, {"top_k": 3}, {"top_p": 0.25}]
    drawn = []
    for option in options:
        state = make_state([option], 500, [7])
        drawn.append(draw(logits, state, [0] * n, list(range(n))))
    assert drawn[0] == [0] * n
    assert max(drawn[1]) > 250
    assert 62 < max(drawn[2]) < 125


@pytest.mark.skipif(INTERPRETED, reason="takes thousands of draws")
@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_k": 20, "top_p": 0.9}])
def test_drawn_frequencies(options: dict[str, float]) -> None:
    """A chi-squared test of draws at consecutive positions; a right sampler fails for one seed in 10,000."""
    num_draws, vocab_size = 20_000, 200
    logits = make_logits(0, 1, vocab_size, "plain", torch.float32)
    state = make_state([options], vocab_size, [20_251_123])
    tokens = draw(logits.expand(num_draws, -1), state, [0] * num_draws, list(range(num_draws)))
    param = SamplingParams(**options)  # type: ignore[arg-type]
    p = filtered_probabilities(logits[0].numpy(), param.temperature, param.top_k, param.top_p, param.min_p)
    counts = np.bincount(tokens, minlength=vocab_size)
    assert counts[p == 0].sum() == 0
    common = p * num_draws >= 8
    counts, p = np.append(counts[common], counts[~common].sum()), np.append(p[common], p[~common].sum())
    counts, expected = counts[p > 0], p[p > 0] * num_draws
    freedom = len(expected) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson-Hilferty
