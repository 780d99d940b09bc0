"""Drafts from a request's own tokens: what followed its last tokens where they stood before, in prompt or output.

Owns the table of places and two ways to read it: n-grams (the longest match, and of those the newest) and suffixes
(all matches, for as long as they agree). Invariant: a call does a bounded amount of work beyond the tokens that are
new, so a long prompt holds up nobody: its table grows over some steps.
"""

from collections import Counter
from collections.abc import Sequence

MOST_INDEXED = 8192  # tokens that one call adds to a table
MOST_PLACES = 64  # the newest, of those that are compared


class Places:
    """Where each run of `width` tokens stands, for one sequence that only grows at its end."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._behind: dict[tuple[int, ...], list[int]] = {}
        self._num_indexed = width - 1  # runs that end before this token are in the table

    def of_last(self, token_ids: Sequence[int]) -> list[int]:
        """Indices of the tokens that stood behind the sequence's last `width` tokens, oldest first."""
        width, behind = self._width, self._behind
        first = self._num_indexed + 1
        for end in range(first, min(len(token_ids), first + MOST_INDEXED)):
            behind.setdefault(tuple(token_ids[end - width : end]), []).append(end)
            self._num_indexed = end
        if len(token_ids) < width:
            return []
        return behind.get(tuple(token_ids[-width:]), [])[-MOST_PLACES:]


def match_length(token_ids: Sequence[int], place: int, known: int, longest: int) -> int:
    """How many tokens before `place` equal the sequence's last ones; `known` of them do."""
    length = known
    while length < longest and length < place and token_ids[place - 1 - length] == token_ids[-1 - length]:
        length += 1
    return length


def continued(token_ids: Sequence[int], place: int, num_tokens: int) -> list[int]:
    """num_tokens tokens from `place` on; at the end of the sequence they go on with themselves, as repetitions do."""
    draft = list(token_ids[place : place + num_tokens])
    period = len(token_ids) - place
    while len(draft) < num_tokens:
        draft.append(draft[len(draft) - period])
    return draft


class NGrams:
    """shortest, longest: how many tokens must match, and how many are compared."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest, self._longest = shortest, longest
        self._places = Places(shortest)

    def propose(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        best, best_length = None, 0
        for place in reversed(self._places.of_last(token_ids)):
            length = match_length(token_ids, place, self._shortest, self._longest)
            if length > best_length:
                best, best_length = place, length
            if length == self._longest:
                break
        return [] if best is None else continued(token_ids, best, num_tokens)


class Suffixes:
    """After Oliaro et al., "SuffixDecoding" (arXiv 2411.04975): a longer context has fewer places, which say less of
    how likely a token is; of all lengths of context the one is taken that promises most accepted tokens.
    """

    def __init__(self, longest: int, tokens_per_match: float, least_probability: float) -> None:
        self._longest, self._tokens_per_match, self._least = longest, tokens_per_match, least_probability
        self._places = Places(2)

    def propose(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        places = self._places.of_last(token_ids)
        lengths = {place: match_length(token_ids, place, 2, self._longest) for place in places}
        best: list[int] = []
        best_score = 0.0
        for length in sorted(set(lengths.values()), reverse=True):
            most = min(num_tokens, max(1, int(length * self._tokens_per_match)))
            agreeing = [place for place in places if lengths[place] >= length]
            draft, score = self._most_likely(token_ids, agreeing, most)
            if score > best_score:
                best, best_score = draft, score
        return best

    def _most_likely(self, token_ids: Sequence[int], places: Sequence[int], num_tokens: int) -> tuple[list[int], float]:
        """The continuation that most of the places agree on, token by token; and how much of it to expect."""
        draft: list[int] = []
        score, probability, ahead = 0.0, 1.0, list(places)
        while len(draft) < num_tokens:
            counts = Counter(token_ids[place] for place in ahead if place < len(token_ids))
            if not counts:
                break
            token_id, count = max(counts.items(), key=lambda item: item[1])
            probability *= count / len(ahead)
            if probability < self._least:
                break
            draft.append(token_id)
            score += probability
            ahead = [place + 1 for place in ahead if place < len(token_ids) and token_ids[place] == token_id]
        return draft, score
