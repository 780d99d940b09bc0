"""What layers with a state are told of a step, and where their states lie.

Owns the two descriptions, computes nothing. Invariant: a request's state is in the slot of its row, and sums up all of
its tokens before the step; every operation leaves there what sums up those of the step as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from nanovllm.kernels.attention_types import AttentionMetadata


@dataclass(frozen=True)
class LayerState:
    """One layer's states, float32, a slot for each row and each snapshot; slots may be far apart, all else is dense.

    conv [num_slots, width - 1, channels]: the last inputs of a causal convolution, oldest first. matrices [num_slots,
    num_heads, key_dim, value_dim].
    """

    conv: Tensor
    matrices: Tensor


@dataclass(frozen=True)
class StepStates:
    """rows [num_reqs] int32: the slot of each request, -1 for padding; what is there counts if it had tokens before.

    snapshots [num_tokens] int32: the slot to which the state behind this token is copied, -1 for none. meta: the batch,
    as attention is told. layers: by their index. at_any_token: snapshots may be asked for behind every token, and not
    only where a GPU has one when it takes many tokens at once.
    """

    rows: Tensor
    snapshots: Tensor
    meta: AttentionMetadata
    layers: Mapping[int, LayerState]
    at_any_token: bool = False
