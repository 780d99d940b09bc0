"""The Triton step preparation against its reference."""

import torch

from nanovllm.kernels.prepare_inputs import prepare_inputs_reference
from tests.kernels.twins import DEVICE, load_twin, twin_test

twin = load_twin("prepare_inputs")
pytestmark = twin_test


def check(
    rows: list[int],
    query_lens: list[int],
    block_size: int = 16,
    num_computed: list[int] | None = None,
    new_blocks: list[int] | None = None,
) -> torch.Tensor:
    """Equal outputs and equal state afterwards, of rows and of all others; returns the block tables."""
    generator = torch.Generator().manual_seed(len(rows))
    num_rows, num_tokens = 9, sum(query_lens)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32).to(DEVICE)

    def given(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    starts, token_ids = given([0, *query_lens]).cumsum(0).int(), integers(-1, 3, num_tokens)
    last_token = integers(0, 1000, num_rows)
    computed = integers(0, 200, num_rows) if num_computed is None else given(num_computed)
    num_blocks = -(-(int(computed.max()) + max(query_lens)) // block_size)
    tables = integers(0, 10_000, num_rows, num_blocks + 3)
    state, want_state = ((last_token.clone(), computed.clone(), tables.clone()) for _ in range(2))
    opened = None if new_blocks is None else given(new_blocks)
    got = twin.prepare_inputs_triton(given(rows), starts, token_ids, *state, block_size, num_blocks, opened)
    want = prepare_inputs_reference(given(rows), starts, token_ids, *want_state, block_size, num_blocks, opened)
    for one, other in zip((*got[:4], *state), (*want[:4], *want_state), strict=True):
        assert torch.equal(one.long(), other.long())
    assert got.block_table.shape == want.block_table.shape == (len(rows), num_blocks)
    for one, other, seq_len in zip(got.block_table, want.block_table, want.seq_lens.tolist(), strict=True):
        used = -(-seq_len // block_size)
        assert torch.equal(one[:used], other[:used])
    for row in set(range(num_rows)) - set(rows):
        assert state[1][row] == computed[row] and torch.equal(state[2][row], tables[row])
    return state[2]


def test_decodes_with_padding_rows() -> None:
    check([4, 0, 8, -1, 3, -1], [1] * 6)


def test_mixed_batch() -> None:
    check([1, 5, 0, 2], [1, 1, 37, 1100])


def test_one_token() -> None:
    check([7], [1], block_size=64)


def test_a_context_of_more_blocks_than_a_program_copies_at_once() -> None:
    check([2, 6], [1, 5], block_size=2, num_computed=[0, 0, 1301, 0, 0, 0, 1024, 0, 0])


def test_new_blocks_enter_the_tables() -> None:
    """Where the token of each row goes, for some of the rows, at the begin and in the middle of a table."""
    num_computed = [48, 0, 17, 16, 31, 0, 64, 5, 160]
    tables = check([3, 0, 2, 8, 1, -1, -1], [1] * 7, 16, num_computed, [70, 71, -1, 72, 73, -1, -1])
    assert [tables[3, 1], tables[0, 3], tables[8, 10], tables[1, 0]] == [70, 71, 72, 73]


def test_a_new_block_for_the_first_of_several_tokens() -> None:
    tables = check([5, 4], [3, 2], 8, [0, 0, 0, 0, 16, 10, 0, 0, 0], [-1, 44])
    assert tables[4, 2] == 44
