import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from nanovllm.engine.logprobs import LogprobsDecoder, LogprobsList, LogprobsMap, LogprobsOfRequest, own_logprob
from nanovllm.engine.scheduler_output import TOKEN_LOGPROB
from nanovllm.outputs import Logprob
from nanovllm.sampling_params import SamplingParams
from nanovllm.token_bytes import _BYTE_OF_CHARACTER
from nanovllm.tokenizer import Tokenizer


def entry(*tokens: tuple[int, float, int]) -> bytes:
    return np.array(list(tokens), dtype=TOKEN_LOGPROB).tobytes()


def test_a_map_is_a_dict_to_its_reader() -> None:
    """The token itself first, then the others in falling order; one that is both stands there once."""
    asked: list[int] = []
    given = entry((7, -1.5, 2), (3, -0.5, 1), (7, -1.5, 2), (9, -2.5, 3))
    found = LogprobsMap(given, lambda token_id: asked.append(token_id) or str(token_id))  # type: ignore[func-returns-value]
    expected = {7: Logprob(-1.5, 2, "7"), 3: Logprob(-0.5, 1, "3"), 9: Logprob(-2.5, 3, "9")}
    assert list(found) == [7, 3, 9] and len(found) == 3 and not asked, "texts are for those that are read"
    assert found[9] == expected[9] and found[7] == expected[7] and asked == [9, 7]
    assert 3 in found and 4 not in found and found.get(4) is None
    assert found == expected and expected == found and dict(found) == expected and [found] == [expected]
    assert list(found.items()) == list(expected.items()) and list(found.values()) == list(expected.values())
    assert repr(found) == repr(expected) and own_logprob(given) == -1.5
    with pytest.raises(KeyError, match="4"):
        found[4]
    for other in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert type(other) is dict and other == expected


def test_maps_without_texts_are_a_list_to_their_reader() -> None:
    entries = [entry((token, -token / 2, 1), (99, -0.25, 2)) for token in range(5)]
    found = LogprobsList(entries)
    expected = [LogprobsMap(given, lambda token_id: None) for given in entries]
    assert found == expected and expected == list(found) and len(found) == 5 and found != expected[:4]
    assert found[1:3] == expected[1:3] and found[-1] == expected[-1] and repr(found) == repr(expected)
    assert [*found, None] == [*expected, None] and found[2][2] == Logprob(-1.0, 1, None)
    with pytest.raises(IndexError):
        found[5]
    for other in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert type(other) is list and other == expected


def test_sums_do_not_depend_on_where_a_stream_was_cut() -> None:
    numbers = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    request = SimpleNamespace(
        params=SamplingParams(logprobs=1), logprobs=[entry((1, number, 1), (2, -0.5, 1)) for number in numbers]
    )
    whole, cut = (LogprobsOfRequest(request, None) for _ in range(2))  # type: ignore[arg-type]
    total = 0.0
    for end, number in enumerate(numbers.tolist(), 1):
        total += number
        assert cut.cumulative(end) == total
    assert whole.cumulative(50) == total and whole.cumulative(20) == cut.cumulative(20) and whole.cumulative(0) == 0.0


def test_a_whole_vocabulary_is_read_in_one_pass() -> None:
    """Each lookup goes on from the one before: else this would compare 10**10 ids."""
    ids = np.arange(100_000)[::-1]
    numbers = np.zeros(100_000, dtype=TOKEN_LOGPROB)
    numbers["token_id"], numbers["logprob"] = ids, -ids
    found = LogprobsMap(numbers.tobytes(), lambda token_id: None)
    assert max(found, key=lambda token_id: found[token_id].logprob) == 0
    assert sum(logprob.logprob for logprob in found.values()) == -ids.sum()


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_texts_of_the_drawn_tokens_join_to_the_text(kind: str) -> None:
    """A character of several tokens comes with its last one, and alternatives are read as they would stand there."""
    if kind == "byte level":
        vocab = dict(_BYTE_OF_CHARACTER)
    else:
        vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {"\u2581is": 256, "is": 257} if kind == "byte fallback" else {"\u0120is": 256, "is": 257}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=kind == "byte fallback"))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.ByteLevel() if kind == "byte level" else decoders.Sequence(steps)
    tokenizer = Tokenizer(lambda: None, backend, eos_token_id=None, bos_token_id=None)
    token_ids = [256, *"\u20ac".encode(), 257]
    entries = [
        np.array([(token_id, -1.0, 1), (257, -2.0, 2), (0xAC, -3.0, 3)], TOKEN_LOGPROB).tobytes()
        for token_id in token_ids
    ]
    maps = LogprobsDecoder(tokenizer).extend(entries)
    assert [drawn[token_id].decoded_token for drawn, token_id in zip(maps, token_ids, strict=True)] == [
        " is", "", "", "\u20ac", "is",
    ]  # fmt: skip
    assert maps[3][257].decoded_token == "\ufffdis" and maps[3][0xAC].decoded_token == "\u20ac"
    assert maps[0][257].decoded_token == "is"
    assert [entry.decoded_token for entry in LogprobsDecoder(None).extend(entries)[0].values()] == [None] * 3
