import random

from nanovllm.engine.speculation import lookup
from nanovllm.engine.speculation.lookup import NGrams, Suffixes


def test_the_longest_match_wins_and_of_those_the_newest() -> None:
    tokens = [1, 2, 3, 4, 9, 2, 3, 5, 9, 2, 3, 6, 1, 2, 3]
    assert NGrams(2, 5).propose(tokens, 2) == [4, 9]  # behind 1 2 3, though 2 3 stood elsewhere since
    assert NGrams(2, 2).propose(tokens, 2) == [6, 1]
    assert NGrams(4, 5).propose(tokens, 2) == []


def test_a_repetition_goes_on() -> None:
    assert NGrams(2, 5).propose([5, 6, 7, 5, 6, 7, 5, 6], 7) == [7, 5, 6, 7, 5, 6, 7]
    assert NGrams(1, 3).propose([8, 8, 8], 4) == [8, 8, 8, 8]


def test_few_tokens_have_no_match() -> None:
    for tokens in ([], [1], [1, 2]):
        assert NGrams(2, 5).propose(tokens, 3) == Suffixes(8, 1.0, 0.1).propose(tokens, 3) == []


def test_ngrams_equal_a_slow_search_as_a_sequence_grows() -> None:
    rng = random.Random(0)
    tokens = [rng.randrange(3) for _ in range(10)]
    table = NGrams(2, 4)
    for _ in range(300):
        draft = table.propose(tokens, 3)
        wanted: list[int] = []
        for length in (2, 3, 4):
            places = [i for i in range(length, len(tokens)) if tokens[i - length : i] == tokens[-length:]]
            if places:
                wanted = (tokens + tokens[places[-1] :] * 3)[places[-1] :][:3]
        assert draft == wanted
        tokens.append(rng.randrange(3))


def test_suffixes_follow_the_majority_as_far_as_it_is_likely() -> None:
    tokens = [7, 1, 2, 3, 4, 0, 8, 1, 2, 3, 5, 0, 9, 1, 2, 3, 4, 0, 6, 1, 2]
    assert Suffixes(24, 4.0, 0.1).propose(tokens, 3) == [3, 4, 0]
    assert Suffixes(24, 4.0, 0.7).propose(tokens, 3) == [3], "4 came in two of three places"
    assert len(Suffixes(24, 0.5, 0.1).propose(tokens, 3)) < 3, "a short match promises few tokens"


def test_a_long_prompt_is_indexed_over_some_calls(monkeypatch) -> None:
    monkeypatch.setattr(lookup, "MOST_INDEXED", 4)
    tokens = [1, 2, 3, 9, 8, 7, 6, 5, 4, 1, 2]
    table = NGrams(2, 2)
    assert [table.propose(tokens, 1) for _ in range(2)] == [[3], [3]]
    late = NGrams(2, 2)
    tokens = [9, 8, 7, 6, 5, 1, 2, 3, 1, 2]
    assert [late.propose(tokens, 1) for _ in range(3)] == [[], [3], [3]]
