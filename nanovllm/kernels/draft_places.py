"""Places of a step that verifies drafts: each of a row's tokens is a decode of its own, behind the one before.

Owns the meaning, in plain PyTorch, of what comes before and after the model there: where each place stands, and how far
each row's draft is accepted; and of a step that drafts, too, what it shows the draft model and what it remembers. The
GPU runs each as one kernel. Invariant: only rows that are named are read or changed; padding (row -1) has position 0,
no slot, and a context of length 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.dispatch import use_triton
from nanovllm.kernels.prepare_inputs import StepInputs


class Places(NamedTuple):
    """Each [size] int32; those of a row follow each other.

    rows: -1 for padding. offsets: how many tokens of the row's stand before this one in the step. drafts: what must be
    drawn behind this token for the next place to count; -1: there is none.
    """

    rows: Tensor
    offsets: Tensor
    token_ids: Tensor
    drafts: Tensor


def prepare_places(
    places: Places, num_computed: Tensor, block_tables: Tensor, block_size: int, num_blocks: int
) -> StepInputs:
    """As `prepare_inputs.prepare_inputs`, with a request for each place. Advances nothing.

    Per row, int32: num_computed [max_num_seqs], block_tables [max_num_seqs, max_blocks]. num_blocks: width of the
    step's own tables.
    """
    if use_triton(places.rows):
        from nanovllm.kernels.triton.draft_places import prepare_places_triton

        return prepare_places_triton(places, num_computed, block_tables, block_size, num_blocks)
    return prepare_places_reference(places, num_computed, block_tables, block_size, num_blocks)


def prepare_places_reference(
    places: Places, num_computed: Tensor, block_tables: Tensor, block_size: int, num_blocks: int
) -> StepInputs:
    is_real, rows = places.rows >= 0, places.rows.clamp(min=0)
    positions = torch.where(is_real, num_computed[rows] + places.offsets, 0)
    tables = block_tables[:, :num_blocks].index_select(0, rows)
    blocks = tables.gather(1, (positions // block_size).long().unsqueeze(1)).squeeze(1).long()
    return StepInputs(
        input_ids=torch.where(is_real, places.token_ids, 0),
        positions=positions,
        slot_mapping=torch.where(is_real, blocks * block_size + positions % block_size, -1),
        seq_lens=torch.where(is_real, positions + 1, 0),
        block_table=tables,
    )


def accept_drafts(places: Places, tokens: Tensor, num_computed: Tensor, last_token: Tensor) -> Tensor:
    """Let each row go on behind its first token that is not its draft's: `num_computed` counts the places up to there,
    `last_token` is what was drawn there. Both [max_num_seqs] int32, changed in place.

    tokens [size] int32: drawn behind each place. Returns int32 [2, size]: these, and 1 at the last place of each row
    that counts.
    """
    if use_triton(tokens):
        from nanovllm.kernels.triton.draft_places import accept_drafts_triton

        return accept_drafts_triton(places, tokens, num_computed, last_token)
    return accept_drafts_reference(places, tokens, num_computed, last_token)


def accept_drafts_reference(places: Places, tokens: Tensor, num_computed: Tensor, last_token: Tensor) -> Tensor:
    rows = places.rows.clamp(min=0)
    differs = (tokens != places.drafts).int()
    before = differs.cumsum(0).int() - differs
    first = torch.arange(len(tokens), device=tokens.device) - places.offsets
    is_end = (differs * (before == before[first]) * (places.rows >= 0)).int()
    num_computed.index_add_(0, rows, is_end * (places.offsets + 1))
    last_token.index_add_(0, rows, is_end * (tokens - last_token[rows]))
    return torch.stack((tokens, is_end))


class Unseen(NamedTuple):
    """Of each row of a step that drafts and verifies, what the draft model is shown. All int32.

    rows [n]: -1 for padding. limits [n]: most tokens of its draft. token_ids [n, num_unseen]: the row's last tokens,
    the newest one last; -1 in the place of those that were seen before. token_rows, of the same shape: -1 there, too.
    rows_ahead [1 + length, n]: the rows whose draft has as many tokens.
    """

    rows: Tensor
    limits: Tensor
    token_ids: Tensor
    token_rows: Tensor
    rows_ahead: Tensor


def find_unseen(rows: Tensor, limits: Tensor, given: Tensor, drawn: Tensor, accepted: Tensor, length: int) -> Unseen:
    """given [n, num_unseen]: as in Unseen; where the newest one is -1, the host does not know them, and they are what
    `drawn` [num_rows + 1, most] holds up to `accepted` [num_rows + 1]. The last row of these two is padding's.
    """
    if use_triton(rows):
        from nanovllm.kernels.triton.draft_places import find_unseen_triton

        return find_unseen_triton(rows, limits, given, drawn, accepted, length)
    return find_unseen_reference(rows, limits, given, drawn, accepted, length)


def find_unseen_reference(
    rows: Tensor, limits: Tensor, given: Tensor, drawn: Tensor, accepted: Tensor, length: int
) -> Unseen:
    back = torch.arange(given.shape[1] - 1, -1, -1, device=rows.device)
    index = accepted[rows][:, None] - back
    remembered = torch.where(index < 0, -1, drawn[rows].gather(1, index.clamp(min=0).long()))
    token_ids = torch.where(given[:, -1:] < 0, remembered, given)
    token_ids = torch.where(rows[:, None] < 0, -1, token_ids).int()
    ahead = torch.arange(1 + length, device=rows.device)[:, None]
    rows_ahead = torch.where(ahead <= limits, rows, -1).int()
    return Unseen(rows, limits, token_ids, torch.where(token_ids < 0, -1, rows[:, None]).int(), rows_ahead)


def draft_places(unseen: Unseen, drafts: Tensor, vocabulary: Tensor | None) -> Places:
    """The places at which the drafts are verified, 1 + length for each row. drafts [length, n] int32: behind the newest
    tokens. vocabulary [V] int32: what is added to their ids for the target's.
    """
    if use_triton(drafts):
        from nanovllm.kernels.triton.draft_places import draft_places_triton

        return draft_places_triton(unseen, drafts, vocabulary)
    return draft_places_reference(unseen, drafts, vocabulary)


def draft_places_reference(unseen: Unseen, drafts: Tensor, vocabulary: Tensor | None) -> Places:
    length, n = drafts.shape
    if vocabulary is not None:
        drafts = drafts + vocabulary[drafts]
    ahead = torch.arange(1 + length, dtype=torch.int32, device=drafts.device).expand(n, -1)
    token_ids = torch.cat((unseen.token_ids[:, -1:], drafts.T), dim=1)
    following = torch.where(ahead < unseen.limits[:, None], token_ids.roll(-1, dims=1), -1)
    return Places(*(field.flatten().int() for field in (unseen.rows_ahead.T, ahead, token_ids, following)))


def note_drawn(words: Tensor, rows: Tensor, drawn: Tensor, accepted: Tensor) -> None:
    """words [2, n * places]: as `accept_drafts` returns them, of as many places for each of the rows [n]. drawn,
    accepted: as in `find_unseen`, changed in place.
    """
    if use_triton(words):
        from nanovllm.kernels.triton.draft_places import note_drawn_triton

        note_drawn_triton(words, rows, drawn, accepted)
    else:
        note_drawn_reference(words, rows, drawn, accepted)


def note_drawn_reference(words: Tensor, rows: Tensor, drawn: Tensor, accepted: Tensor) -> None:
    tokens, ends = words.view(2, len(rows), -1)
    drawn[rows, : tokens.shape[1]] = tokens  # padding's -1 is the last row
    accepted[rows] = ends.argmax(dim=1).int()
