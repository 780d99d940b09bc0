"""Rotary position embedding (Su et al., 2021): the table of cosines and sines that a step's positions look up.

Owns the table and the order of partly rotated dimensions; how frequencies are stretched for long inputs is
`rope_scaling.py`, the rotation itself `kernels/rope.py`. Invariant: `cos_sin` of a position is the same in every step,
but for the types that `rope_scaling.LENGTH_DEPENDENT` names.
"""

import torch
from torch import Tensor, nn

from nanovllm.config import RopeConfig
from nanovllm.kernels.gather_rows import gather_rows
from nanovllm.layers.rope_scaling import LENGTH_DEPENDENT, cos_sin_of_lengths, rope_tables


class RotaryEmbedding(nn.Module):
    """positions [num_tokens] -> cos_sin [num_tokens, head_dim] float32: head_dim / 2 cosines, then as many sines."""

    def __init__(self, head_dim: int, max_len: int, rope: RopeConfig) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.rope = rope
        self.table: Tensor  # [max_len, head_dim]
        for name, table in rope_tables(head_dim, max_len, rope):
            self.register_buffer(name, table, persistent=False)

    def forward(self, positions: Tensor, rope_lens: Tensor | None = None) -> Tensor:
        """rope_lens [num_tokens]: the length of the context that the token counts as part of.

        Without them, longrope takes each token to be the last one of its context.
        """
        if rope_lens is None or self.rope.rope_type not in LENGTH_DEPENDENT:
            return gather_rows(self.table, positions)
        return cos_sin_of_lengths(self.head_dim, self.rope, dict(self.named_buffers()), positions, rope_lens)


def halves_order(head_dim: int, rope: RopeConfig) -> Tensor:
    """An order of a head's dimensions in which a partial rotation is a whole one, for the rows of q and k. [head_dim]

    The checkpoint rotates pairs (i, i + rotary_dim / 2); kernels rotate (i, i + head_dim / 2). Scores do not depend on
    the order of the dimensions, as long as q and k agree on it.

        checkpoint    [ a0 a1 | b0 b1 | c0 c1 c2 c3 ]        a, b: rotated        c: not rotated
        here          [ a0 a1   c0 c1 | b0 b1   c2 c3 ]      pairs (a0, b0), (a1, b1), and (c0, c2), (c1, c3) by 0
    """
    rotary_dim = int(head_dim * rope.share)
    a, b = torch.arange(rotary_dim, device="cpu").chunk(2)
    c, d = torch.arange(rotary_dim, head_dim, device="cpu").chunk(2)
    return torch.cat((a, c, b, d))
