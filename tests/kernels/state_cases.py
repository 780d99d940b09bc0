"""Steps for layers with a state: requests of some lengths, new or not, some of whose states are to be kept."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels.attention_types import AttentionMetadata
from nanovllm.kernels.state_types import LayerState, StepStates


@dataclass(frozen=True)
class StateCase:
    step: StepStates
    num_tokens: int
    num_slots: int

    def states(self, *shape: int) -> Tensor:
        """[num_slots, *shape], each slot's numbers apart from the next one's."""
        data = torch.randn(self.num_slots, 3 + torch.Size(shape).numel())
        return data.to(self.step.rows.device)[:, 3:].view(self.num_slots, *shape)


def make_states_case(
    lens: list[int], num_before: list[int], *, device: torch.device | str = "cpu", num_padding: int = 0, every: int = 5
) -> StateCase:
    """num_before: tokens of each request before the step. Padding stands behind the requests, without tokens; the state
    behind each token whose position in the context is a multiple of `every` is kept, each in a slot of its own."""
    num_reqs = len(lens) + num_padding
    num_rows = 2 * num_reqs
    lens = lens + [0] * num_padding
    starts = torch.tensor([0, *lens]).cumsum(0).int()
    seq_lens = [n + before for n, before in zip(lens, num_before + [0] * num_padding, strict=True)]
    positions = [before + i for n, before in zip(lens, num_before + [0] * num_padding, strict=True) for i in range(n)]
    kept = [i for i, position in enumerate(positions) if (position + 1) % every == 0]
    snapshots = torch.full((len(positions),), -1, dtype=torch.int32)
    snapshots[kept] = num_rows + torch.randperm(len(kept)).int()
    rows = torch.randperm(num_rows)[:num_reqs].int()
    rows[num_reqs - num_padding :] = -1
    num_decodes = next((i for i, n in enumerate(lens) if n != 1), len(lens))
    meta = AttentionMetadata(
        query_start_loc=starts.to(device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        block_table=torch.zeros(num_reqs, 1, dtype=torch.int32, device=device),
        slot_mapping=torch.zeros(len(positions), dtype=torch.int64, device=device),
        num_decodes=num_decodes,
        num_reqs=num_reqs,
        max_query_len=max(lens),
        query_lens_host=lens,
        seq_lens_host=seq_lens,
    )
    step = StepStates(rows.to(device), snapshots.to(device), meta, {})
    return StateCase(step, len(positions), num_rows + len(kept) + 1)


def on_host(net: Any, state: LayerState, step: StepStates) -> tuple[Any, LayerState, StepStates]:
    """Copies on the CPU: what a reference takes behind its inputs."""

    def copied(one: Any) -> Any:
        tensors = {name: value for name, value in vars(one).items() if isinstance(value, Tensor)}
        return replace(one, **{name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()})

    return copied(net), copied(state), replace(copied(step), meta=copied(step.meta))
