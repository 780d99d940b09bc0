import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.sampling.edited_rows import find_edited
from nanovllm.sampling.philox import uniform
from nanovllm.sampling.sampler import Sampler
from nanovllm.sampling_params import SamplingParams
from tests.sampling.reference import edited, filtered_probabilities
from tests.sampling.requests import begin, enter, sampled

MIXED = [
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
]


def sample(
    logits: torch.Tensor,
    params: list[SamplingParams],
    seeds: list[int],
    positions: list[int],
    *,
    rows: list[int] | None = None,
    prompt_len: int = 1,
    stop_ids: tuple[int, ...] = (),
    histories: list[list[int]] | None = None,
    bad_words: tuple[tuple[int, ...], ...] = (),
) -> list[int]:
    """Put the requests into rows of a new state and sample once."""
    rows = rows or list(range(len(params)))
    sampler = Sampler(max(rows) + 1, logits.shape[1], "cpu")
    for i, (row, param, seed) in enumerate(zip(rows, params, seeds, strict=True)):
        enter(sampler, row, param, seed, prompt_len, stop_ids, histories[i] if histories else None, bad_words)
    before = logits.clone()
    tokens = sampler.sample(logits, sampled(rows, positions))
    assert tokens.dtype == torch.int32
    assert torch.equal(logits.nan_to_num(7), before.nan_to_num(7)), "logits are not changed"
    assert ((tokens >= 0) & (tokens < logits.shape[1])).all()
    assert torch.equal(sampler.columns.last_token[rows], tokens), "the next step finds them there"
    return tokens.tolist()


def make_logits(seed: int, num_rows: int, vocab_size: int, dtype: torch.dtype, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_rows, vocab_size, generator=generator) * spread).to(dtype)


def halve_odd_tokens(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    logits[1::2] /= 2
    return logits - len(token_ids) % 3


request_params = st.builds(
    SamplingParams,
    presence_penalty=st.sampled_from([0.0, 0.0, -2.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 2.0, -0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.5]),
    logit_bias=st.sampled_from([None, None, {0: 3.0}, {0: -100.0}]),
    allowed_token_ids=st.sampled_from([None, None, (0,)]),
    logits_processors=st.sampled_from([None, None, (halve_odd_tokens,)]),
    temperature=st.sampled_from([0.0, 1e-4, 0.3, 0.8, 1.0, 2.0, 1e4]),
    top_k=st.sampled_from([0, 1, 2, 5, 50, 127, 128, 129, 400, 5000]),
    top_p=st.sampled_from([1.0, 1e-30, 0.3, 0.9, 0.95, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 1e-4, 0.05, 0.9, 1.0]),
    min_tokens=st.sampled_from([0, 0, 3, 8]),
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    st.lists(request_params, min_size=1, max_size=6),
    st.sampled_from([1, 2, 50, 128, 129, 300, 1000]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0.3, 3.0, 30.0]),
    st.integers(0, 2**20),
)
def test_mixed_batches_agree_with_numpy(
    params: list[SamplingParams], vocab_size: int, dtype: torch.dtype, spread: float, case: int
) -> None:
    """All stages in their order, each row with its own parameters, greedy rows beside sampled ones."""
    logits = make_logits(case, len(params), vocab_size, dtype, spread)
    seeds = [case + 31 * i for i in range(len(params))]
    positions = [5 + i for i in range(len(params))]
    stop_ids = (0, vocab_size - 1) if vocab_size > 2 else ()
    rng = np.random.default_rng(case)
    histories = [rng.integers(0, min(vocab_size, 9), position).tolist() for position in positions]
    bad_words = ((vocab_size // 2,), (*histories[0][-1:], 0), (*histories[-1][-2:], 1), (7, 7, 7)) if case % 2 else ()
    bad_words = tuple(word for word in bad_words if max(word) < vocab_size > 2)
    tokens = sample(
        logits,
        params,
        seeds,
        positions,
        prompt_len=2,
        stop_ids=stop_ids,
        histories=histories,
        bad_words=bad_words,
    )
    for i, (param, token) in enumerate(zip(params, tokens, strict=True)):
        row = edited(
            logits[i].float().numpy(),
            histories[i][:2],
            histories[i][2:],
            param,
            stop_ids=stop_ids,
            bad_words=bad_words,
        )
        if not np.isfinite(row).any():
            continue  # the stages contradict each other: there is no right token
        if param.is_greedy:
            assert row[token] >= row.max() - 1e-5 * max(1, abs(row.max()))
            continue
        u = uniform(torch.tensor([seeds[i]]), torch.tensor([positions[i]])).item()
        fits = False
        for slack in (0.0, 1e-5, -1e-5):  # a choice too close to call may go either way
            p = filtered_probabilities(row, param.temperature, param.top_k, param.top_p, param.min_p, slack)
            reached = p.cumsum()
            fits |= p[token] > 0 and reached[token] - p[token] - 3e-6 <= u <= reached[token] + 3e-6
        assert fits, (param, token, u)


EDITS: dict[str, dict[str, Any]] = {
    "none": {},
    "allowed_token_ids": {"allowed_token_ids": [1, 2, 3, 5, 8, 13, 21, 34]},
    "bad_words": {},  # their tokens, and a grammar's mask, come from elsewhere
    "min_tokens": {"min_tokens": 9},
    "logit_bias": {"logit_bias": {3: 9.5, 8: 9.0, 40: 12.0}},
    "logits_processors": {"logits_processors": [halve_odd_tokens]},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "frequency_penalty": {"frequency_penalty": 2.0},
    "presence_penalty": {"presence_penalty": -2.0},
    "grammar": {},
}
MASK = np.array([0b1101_0010_1100_1010_0110_1010_1110, 0b1_1000_0000], dtype=np.int32)  # 50 tokens, some allowed


def test_every_two_edits_on_two_rows_and_on_one_agree_with_numpy() -> None:
    """What a row asks for changes neither its neighbour's tokens nor, by what it leaves empty, their dtype."""
    logits = make_logits(5, 2, 50, torch.float32)
    history = [[4, 9, 8], [8, 3, 3, 5, 21]]
    bad_words, stop_ids = ((7, 8), (21,), (5, 21, 3)), (8, 34)

    def run(asked: list[tuple[str, ...]], which: list[int]) -> list[int]:
        sampler = Sampler(len(asked), logits.shape[1], "cpu")
        for row, names in enumerate(asked):
            options = {key: value for name in names for key, value in EDITS[name].items()}
            tokens = [token for part in history for token in part]
            words = bad_words if "bad_words" in names else ()
            enter(sampler, row, SamplingParams(**options, temperature=0), 0, 3, stop_ids, tokens, words)
        begin(sampler, grammar_bitmask={row: MASK for row, names in enumerate(asked) if "grammar" in names})
        return sampler.sample(logits[which], sampled(range(len(asked)), [8] * len(asked))).tolist()

    def wanted(names: tuple[str, ...], which: int) -> int:
        options = {key: value for name in names for key, value in EDITS[name].items()}
        row = edited(
            logits[which].numpy(),
            *history,
            SamplingParams(**options),
            stop_ids=stop_ids,
            bad_words=bad_words if "bad_words" in names else (),
        )
        if "grammar" in names:
            allowed = np.array([MASK[token // 32] >> token % 32 & 1 for token in range(50)], dtype=bool)
            row = np.where(allowed, row if np.isfinite(row[allowed]).any() else 0, -np.inf)
        return int(row.argmax())

    for one, other in itertools.product(EDITS, EDITS):
        alone = [*run([(one,)], [0]), *run([(other,)], [1])]
        assert alone == [wanted((one,), 0), wanted((other,), 1)]
        assert run([(one,), (other,)], [0, 1]) == alone, f"{one} beside {other}"
        assert run([(one, other)], [1]) == [wanted((one, other), 1)], f"{one} and {other} on one row"
        assert run([(one, other), ("none",), (other,)], [0, 1, 1]) == [
            wanted((one, other), 0),
            wanted(("none",), 1),
            alone[1],
        ]


@pytest.mark.parametrize("vocab_size", [2000, 16384, 20011])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_draw_in_any_row_batch_and_order(vocab_size: int, dtype: torch.dtype) -> None:
    """At the sampler: alone, in another row, another order, beside other requests with other seeds."""
    params = [SamplingParams(**options) for options in MIXED] * 2
    n = len(params)
    logits = make_logits(7, n, vocab_size, dtype)
    seeds, positions = [1000 + i for i in range(n)], [3 * i for i in range(n)]
    expected = sample(logits, params, seeds, positions)
    for i in range(n):
        assert sample(logits[i : i + 1], params[i : i + 1], seeds[i : i + 1], positions[i : i + 1]) == [expected[i]]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1)).tolist()
    rows = torch.randperm(n + 9, generator=torch.Generator().manual_seed(2)).tolist()[:n]
    shuffled = sample(
        logits[order], [params[i] for i in order], [seeds[i] for i in order], [positions[i] for i in order], rows=rows
    )
    assert shuffled == [expected[i] for i in order]
    others = [seed if i % 3 == 0 else seed + 77 for i, seed in enumerate(seeds)]
    assert sample(logits, params, others, positions)[::3] == expected[::3]


def test_a_token_depends_on_seed_and_on_position() -> None:
    """The noise is keyed by both, over all 64 bits of the seed."""
    logits = torch.zeros(64, 50_000)
    params = [SamplingParams()] * 64
    by_position = sample(logits, params, [5] * 64, list(range(64)))
    by_seed = sample(logits, params, [5 + 2**32 * i for i in range(64)], [0] * 64)
    assert len(set(by_position)) > 60
    assert len(set(by_seed)) > 60
    assert sample(logits, params, [5 + 2**64] * 64, list(range(64))) == by_position


def chi_squared_p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    assert expected.min() > 5, "too few draws for the approximation"
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(counts) - 1, dtype=torch.float64)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 2.0, "top_k": 20},
        {"top_p": 0.9},
        {"min_p": 0.05, "temperature": 1.3},
        {"temperature": 1.2, "min_p": 0.01, "top_k": 100, "top_p": 0.95},
        {"temperature": 1.1, "logit_bias": {3: 1.5, 7: -2.0}, "allowed_token_ids": list(range(25)), "min_tokens": 5},
    ],
)
@pytest.mark.parametrize("vocab_size", [40, 200])
def test_drawn_frequencies(options: dict[str, float], vocab_size: int) -> None:
    """A chi-squared test of draws at consecutive positions.

    It rejects below p = 1e-4: a right sampler would fail for one seed in 10,000. The seed is fixed, so the result is
    always the same.
    """
    num_draws = 20_000
    logits = make_logits(0, 1, vocab_size, torch.float32, spread=1.0)
    param = SamplingParams(**options)  # type: ignore[arg-type]
    sampler = Sampler(1, vocab_size, "cpu")
    enter(sampler, 0, param, 20_251_123, 1, ())
    rows = sampled(np.zeros(num_draws), np.arange(num_draws, dtype=np.int32))
    drawn = sampler.sample(logits.expand(num_draws, -1), rows)
    probabilities = torch.from_numpy(
        filtered_probabilities(
            edited(logits[0].numpy(), [0], [], param), param.temperature, param.top_k, param.top_p, param.min_p
        )
    )
    counts = torch.bincount(drawn, minlength=vocab_size)
    assert counts[probabilities == 0].sum() == 0
    common = probabilities * num_draws >= 8
    counts = torch.cat([counts[common], counts[~common].sum()[None]])  # rare tokens count as one
    probabilities = torch.cat([probabilities[common], probabilities[~common].sum()[None]])
    if probabilities[-1] == 0:
        counts, probabilities = counts[:-1], probabilities[:-1]
    assert chi_squared_p_value(counts, probabilities) > 1e-4


@pytest.mark.parametrize("neighbour", ["position", "seed"])
def test_neighbours_are_independent(neighbour: str) -> None:
    """Draws of neighbouring positions, and of neighbouring seeds: all 16 pairs of four tokens equally often.

    False alarms: one in 10,000, for other seeds than these.
    """
    num_draws = 20_000
    sampler = Sampler(2, 4, "cpu")
    enter(sampler, 0, SamplingParams(), 1, 1, ())
    enter(sampler, 1, SamplingParams(), 2, 1, ())
    rows, positions = np.zeros(num_draws), np.arange(num_draws)
    logits = torch.zeros(num_draws, 4)
    first = sampler.sample(logits, sampled(rows, positions))
    if neighbour == "position":
        second = sampler.sample(logits, sampled(rows, positions + 1))
        first, second = first[::2], second[::2]  # disjoint pairs
    else:
        second = sampler.sample(logits, sampled(rows + 1, positions))
    counts = torch.bincount(first * 4 + second, minlength=16)
    assert chi_squared_p_value(counts, torch.full((16,), 1 / 16)) > 1e-4


def test_min_tokens_holds_stop_ids_back_until_the_position() -> None:
    """Greedy and sampled rows; the first token after min_tokens outputs may stop again."""
    logits = torch.zeros(4, 10)
    logits[:, 3], logits[:, 5] = 50.0, 40.0
    params = [SamplingParams(temperature=0, min_tokens=2), SamplingParams(min_tokens=2)] * 2
    tokens = sample(logits, params, [1, 2, 3, 4], [8, 8, 9, 9], prompt_len=7, stop_ids=(3,))
    assert tokens == [5, 5, 3, 3]


def test_who_is_edited_is_about_these_rows_at_these_positions() -> None:
    """A row of min_tokens is a plain one again once it is long enough, so that a GPU returns to its captured path."""
    sampler = Sampler(3, 10, "cpu")
    enter(sampler, 1, SamplingParams(min_tokens=2), 0, 1, (3,))
    enter(sampler, 2, SamplingParams(logit_bias={1: 1.0}), 0, 1, (3,))
    assert find_edited(sampler, sampled(range(3), [2, 2, 2])).tolist() == [1, 2]
    assert find_edited(sampler, sampled(range(3), [3, 3, 3])).tolist() == [2]
    enter(sampler, 2, SamplingParams(), 0, 1, (3,))
    assert not len(find_edited(sampler, sampled([2], [0])))


def test_extreme_temperatures() -> None:
    """Very low is greedy in effect, very high uniform; neither gives NaN."""
    logits = make_logits(0, 200, 50, torch.float32)
    cold = sample(logits, [SamplingParams(temperature=1e-4)] * 200, list(range(200)), [1] * 200)
    assert cold == logits.argmax(-1).tolist()
    hot = sample(logits, [SamplingParams(temperature=1e4)] * 200, list(range(200)), [1] * 200)
    assert len(set(hot)) > 40


@pytest.mark.parametrize("options", MIXED)
@pytest.mark.parametrize("vocab_size", [1, 3, 1000])
def test_odd_logits(options: dict[str, float], vocab_size: int) -> None:
    """Huge and masked logits give the only sane token; a vocabulary of one works; NaN still gives an id in range."""
    huge = torch.full((1, vocab_size), -1e30)
    huge[0, vocab_size // 2] = 1e30
    masked = torch.full((1, vocab_size), -math.inf)
    masked[0, vocab_size // 2] = -3.0
    params = [SamplingParams(**options)]  # type: ignore[arg-type]
    assert sample(huge, params, [1], [1]) == [vocab_size // 2]
    assert sample(masked, params, [1], [1]) == [vocab_size // 2]
    for value in (-math.inf, math.inf, math.nan):
        sample(torch.full((1, vocab_size), value), params, [1], [1])


def test_flat_rows_are_exact_too() -> None:
    """Where the highest tokens do not hold enough weight, whole rows are searched: top_p and top_k over 10,000 ties."""
    logits = torch.zeros(40, 10_000)
    half = sample(logits, [SamplingParams(top_p=0.5)] * 40, list(range(40)), [1] * 40)
    assert max(half) < 5000 and len(set(half)) > 30
    tied = sample(logits, [SamplingParams(top_k=3)] * 40, list(range(40)), [1] * 40)
    assert max(tied) > 5000, "all tokens tie with the third"


@pytest.mark.parametrize("options", [{"top_k": 200, "top_p": 0.1}, {"min_p": 0.5, "top_p": 0.1}])
def test_the_nucleus_is_one_of_what_the_other_filters_left(options: dict[str, float]) -> None:
    """top_p counts the weight that top_k and min_p left, also where that is more tokens than are looked at first."""
    logits = make_logits(0, 1, 1000, torch.float32, spread=0.3)
    param = SamplingParams(**options)  # type: ignore[arg-type]
    drawn = sample(logits.expand(300, -1), [param] * 300, list(range(300)), [1] * 300)
    p = filtered_probabilities(logits[0].numpy(), 1.0, param.top_k, param.top_p, param.min_p)
    assert (p[drawn] > 0).all()
    assert len(set(drawn)) > 0.8 * (p > 0).sum()


@pytest.mark.gpu
def test_cpu_and_gpu_draw_the_same_tokens() -> None:
    """But for a draw that lands on the rounding of a boundary: one in a thousand may differ."""
    n, vocab_size = 1000, 20_000
    logits = make_logits(0, n, vocab_size, torch.bfloat16)
    drawn = []
    for device in ("cpu", "cuda"):
        sampler = Sampler(n, vocab_size, device)
        for row in range(n):
            options = MIXED[row % len(MIXED)]
            enter(sampler, row, SamplingParams(min_tokens=row % 2, **options), row, 5, (1, 2))  # type: ignore[arg-type]
        drawn.append(sampler.sample(logits.to(device), sampled(range(n), np.full(n, 5), device)).cpu())
    assert (drawn[0] != drawn[1]).sum() <= n // 1000
