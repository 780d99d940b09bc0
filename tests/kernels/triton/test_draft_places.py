"""The Triton places of drafts against their reference."""

import pytest
import torch

from nanovllm.kernels.draft_places import (
    Places,
    accept_drafts_reference,
    draft_places_reference,
    find_unseen_reference,
    note_drawn_reference,
    prepare_places_reference,
)
from tests.kernels.twins import DEVICE, load_twin, twin_test

twin = load_twin("draft_places")
pytestmark = twin_test
NUM_ROWS = 9


def make_places(counts: dict[int, int], padding: int, generator: torch.Generator) -> Places:
    """counts: places of each row."""
    rows = [row for row, count in counts.items() for _ in range(count)] + [-1] * padding
    offsets = [i for count in counts.values() for i in range(count)] + [0] * padding
    ends = [i == count - 1 for count in counts.values() for i in range(count)] + [True] * padding
    token_ids = torch.randint(3, (len(rows),), generator=generator).tolist()
    drafts = [-1 if is_end else token for is_end, token in zip(ends, [*token_ids[1:], 0], strict=True)]
    return Places(*torch.tensor([rows, offsets, token_ids, drafts], dtype=torch.int32, device=DEVICE))


@pytest.mark.parametrize(
    ("counts", "padding"), [({4: 1}, 1), ({2: 8}, 0), ({7: 3, 0: 1, 5: 6}, 6), (dict.fromkeys(range(9), 5), 3)]
)
def test_places_and_what_is_accepted(counts: dict[int, int], padding: int) -> None:
    generator = torch.Generator().manual_seed(len(counts))
    places = make_places(counts, padding, generator)
    computed = torch.randint(200, (NUM_ROWS,), generator=generator, dtype=torch.int32).to(DEVICE)
    tables = torch.randint(10_000, (NUM_ROWS, 20), generator=generator, dtype=torch.int32).to(DEVICE)
    got = twin.prepare_places_triton(places, computed, tables, 16, 14)
    want = prepare_places_reference(places, computed, tables, 16, 14)
    for one, other in zip(got[:4], want[:4], strict=True):
        assert torch.equal(one.long(), other.long())
    for one, other, seq_len in zip(got.block_table, want.block_table, want.seq_lens.tolist(), strict=True):
        assert torch.equal(one[: -(-seq_len // 16)], other[: -(-seq_len // 16)])
    for right in (0.0, 0.7, 1.0):
        is_right = (torch.rand(len(places.rows), generator=generator) < right).to(DEVICE)
        tokens = torch.where(is_right & (places.drafts >= 0), places.drafts, 5)
        last = torch.full((NUM_ROWS,), 77, dtype=torch.int32, device=DEVICE)
        state, want_state = (computed.clone(), last.clone()), (computed.clone(), last.clone())
        result = twin.accept_drafts_triton(places, tokens, *state)
        assert torch.equal(result, accept_drafts_reference(places, tokens, *want_state))
        assert torch.equal(state[0], want_state[0]) and torch.equal(state[1], want_state[1])
        if right == 1.0:
            assert (state[0] - computed).tolist() == [counts.get(row, 0) for row in range(NUM_ROWS)]


@pytest.mark.parametrize(("num_reqs", "width", "length"), [(1, 2, 1), (3, 5, 4), (6, 5, 2)])
def test_a_step_that_drafts_begins_where_the_last_one_ended(num_reqs: int, width: int, length: int) -> None:
    """The first request is one of which the host knows what is unseen, the last one is padding."""
    generator = torch.Generator().manual_seed(num_reqs)
    most = 4

    def numbers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32).to(DEVICE)

    rows = torch.randperm(NUM_ROWS, generator=generator)[:num_reqs].int().to(DEVICE)
    limits, given = numbers(length + 1, num_reqs), torch.full((num_reqs, width), -1, dtype=torch.int32, device=DEVICE)
    given[0, -1] = 7
    rows[1:][-1:], limits[1:][-1:] = -1, 0
    drawn, accepted = numbers(50, NUM_ROWS + 1, 1 + most), numbers(width, NUM_ROWS + 1)
    arguments = rows, limits, given, drawn, accepted, length
    unseen, wanted = twin.find_unseen_triton(*arguments), find_unseen_reference(*arguments)
    for one, other in zip(unseen, wanted, strict=True):
        assert torch.equal(one, other)
    assert (unseen.token_ids >= 0).any(1).tolist() == (rows >= 0).tolist()
    drafts, vocabulary = numbers(40, length, num_reqs), numbers(9, 40)
    for ids in (None, vocabulary):
        places, wanted_places = (
            twin.draft_places_triton(unseen, drafts, ids),
            draft_places_reference(wanted, drafts, ids),
        )
        for one, other in zip(places, wanted_places, strict=True):
            assert torch.equal(one, other)
    ends = torch.zeros(num_reqs, 1 + length, dtype=torch.int32, device=DEVICE)
    ends.scatter_(1, limits[:, None].long(), 1)
    words = torch.stack((numbers(50, num_reqs * (1 + length)), ends.flatten()))
    others = drawn.clone(), accepted.clone()
    twin.note_drawn_triton(words, rows, drawn, accepted)
    note_drawn_reference(words, rows, *others)
    for one, other in zip((drawn, accepted), others, strict=True):
        assert torch.equal(one[:-1], other[:-1])
