"""Rotary position embedding (Su et al., 2021): the table of cosines and sines that a step's positions look up.

Owns the table; how frequencies are stretched for long inputs is `rope_scaling.py`, which dimensions turn together
`head_order.py`, the rotation itself `kernels/rope.py`. Invariant: `cos_sin` of a position is the same in every step,
but for the types that `rope_scaling.LENGTH_DEPENDENT` names.
"""

from torch import Tensor, nn

from nanovllm.kernels.gather_rows import gather_rows
from nanovllm.layers.rope_scaling import LENGTH_DEPENDENT, cos_sin_of_lengths, rope_tables
from nanovllm.model_config import RopeConfig


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
