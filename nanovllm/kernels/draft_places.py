"""Places of a step that verifies drafts: each of a row's tokens is a decode of its own, behind the one before.

Owns the meaning, in plain PyTorch, of what comes before and after the model there: where each place stands, and how far
each row's draft is accepted. The GPU runs each as one kernel. Invariant: only rows that are named are read or changed;
padding (row -1) has position 0, no slot, and a context of length 0.
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
