import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.sampling.philox import philox4x32, uniform

# Published with the generator (Random123, tests/kat_vectors): counter, key, result of ten rounds.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> torch.Tensor:
    return torch.tensor([[int(word, 16)] for word in text.split()])


def numpy_philox(counter: list[int], key: list[int]) -> list[int]:
    c, k = [np.uint64(word) for word in counter], [np.uint64(word) for word in key]
    word = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        c = [(second >> shift) ^ c[1] ^ k[0], second & word, (first >> shift) ^ c[3] ^ k[1], first & word]
        k = [(k[0] + np.uint64(0x9E3779B9)) & word, (k[1] + np.uint64(0xBB67AE85)) & word]
    return [int(x) for x in c]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, result: str) -> None:
    """The generator is the published one, so it can be written again for any device."""
    assert torch.equal(philox4x32(words(counter), words(key)), words(result))


uint32 = st.integers(0, 2**32 - 1)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.tuples(*[uint32] * 6), min_size=1, max_size=5))
def test_agrees_with_numpy(columns: list[tuple[int, ...]]) -> None:
    table = torch.tensor(columns).T
    result = philox4x32(table[:4], table[4:])
    assert result.T.tolist() == [numpy_philox(list(c[:4]), list(c[4:])) for c in columns]


def test_uniform_is_the_top_of_the_first_word() -> None:
    """The definition of the draw's number, for seeds over the whole 64 bits."""
    for seed, position in [(0, 0), (1, 5), (-1, 7), (2**63 - 1, 2**31 - 1), (-(2**63), 123456), (0x123456789ABCDEF, 1)]:
        word = numpy_philox([position, 0, 0, 0], [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF])[0]
        result = uniform(torch.tensor([seed]), torch.tensor([position], dtype=torch.int32))
        assert result.dtype == torch.float32
        assert result.item() == (word >> 8) / 2**24


def test_uniform_stays_below_one() -> None:
    values = uniform(torch.arange(200_000), torch.full((200_000,), 3))
    assert 0 <= values.min() < 1e-4
    assert 1 - 1e-4 < values.max() < 1
    assert abs(values.double().mean() - 0.5) < 5 * (1 / 12 / 200_000) ** 0.5
