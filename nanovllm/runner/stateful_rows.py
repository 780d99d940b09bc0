"""StatefulRows: rows of a model some of whose layers keep states, and what a step of it is told.

        row | num_computed | block_table ... | snapshots ...          and in every layer with a state: rows | snapshots

Owns the states' tensors, and the table that says at the ends of which blocks a row's state is copied to which slot.
Invariant: a row that begins with tokens behind it has the state of the snapshot that its table has for the last of
their blocks; from then on its table has what its own plans put there.

In a step that verifies drafts, the state behind each token of a row with a draft goes to a slot of its own, behind
those of the snapshots; once it is known how many tokens count, that behind the last of them becomes the row's.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend, GroupInputs
from nanovllm.cache_specs import CacheGroups
from nanovllm.config import ResolvedConfig
from nanovllm.kernels.attention_types import AttentionMetadata
from nanovllm.kernels.copy_states import copy_states
from nanovllm.kernels.draft_places import Places
from nanovllm.kernels.state_types import LayerState, StepStates
from nanovllm.model_config import ModelConfig
from nanovllm.runner.batch_state import BatchState
from nanovllm.runner.kv_cache import MakeZeros, zeros
from nanovllm.speculative_config import num_draft_places, num_draft_slots


class StatefulRows(BatchState):
    def __init__(
        self,
        config: ResolvedConfig,
        model_config: ModelConfig,
        groups: CacheGroups,
        num_blocks: int,
        device: torch.device,
        make: MakeZeros = zeros,
    ) -> None:
        """num_blocks: of the KV cache, by which there are so many snapshots. make: the states."""
        max_blocks = -(-config.max_model_len // config.block_size)
        super().__init__(config.max_num_seqs, max_blocks, device, groups.num_tables)
        memory = model_config.state_memory(config.kv_cache_dtype, config.block_size)
        assert memory is not None and model_config.state is not None and len(groups.specs) == 1
        shape = model_config.state.part(config.tensor_parallel_size)
        slots = memory.slots(config.max_num_seqs, num_blocks)
        self._first_of_drafts, self._most_places = slots.stop, num_draft_places(config.speculative_config)
        self._drafts: Drafts | None = None  # of the step that is about to be told of its states
        num_slots = slots.stop + num_draft_slots(config)
        self.states = make((len(groups.state_layers), num_slots, shape.num_floats), torch.float32, device)
        self.group_of_layer = [int(layer in groups.state_layers) for layer in range(groups.num_layers)]
        self._snapshots = self.block_tables[:, max_blocks:]
        self._snapshots.fill_(-1)
        self._block_size = config.block_size
        num_inputs = shape.conv_channels * (shape.conv_width - 1)
        self._layers = {
            layer: LayerState(
                states[:, :num_inputs].view(num_slots, shape.conv_width - 1, shape.conv_channels),
                states[:, num_inputs:].view(num_slots, shape.num_heads, shape.key_dim, shape.value_dim),
            )
            for layer, states in zip(groups.state_layers, self.states, strict=True)
        }

    def apply(self, computed: Tensor, blocks: Tensor) -> None:
        """Also: give new rows their states, before anything of the step is computed."""
        rows, num_computed = computed.unbind(1)
        if computed.shape[0]:
            self._snapshots[rows] = -1
        super().apply(computed, blocks)
        if computed.shape[0]:
            last = (num_computed // self._block_size - 1).clamp(min=0)
            sources = torch.where(num_computed > 0, self._snapshots[rows, last], rows)
            self.states[:, rows] = self.states[:, sources]

    def inputs(
        self, rows: Tensor, positions: Tensor, meta: AttentionMetadata, backend: AttentionBackend
    ) -> list[GroupInputs]:
        """As of `LayerGroups`: for attention, then for layers with a state. Can be captured."""
        if self._drafts is not None:
            step, self._drafts = self._verifying(self._drafts, positions, meta), None
            return [GroupInputs(backend.prepare(meta), meta.slot_mapping), GroupInputs(step, step.snapshots)]
        index = torch.arange(len(positions), dtype=torch.int32, device=positions.device)
        request = torch.searchsorted(meta.query_start_loc[1:], index, right=True).clamp(max=len(rows) - 1)
        snapshots = torch.where(meta.slot_mapping >= 0, self._snapshots_at(rows[request], positions), -1)
        step = StepStates(rows, snapshots, meta, self._layers)
        return [GroupInputs(backend.prepare(meta), meta.slot_mapping), GroupInputs(step, snapshots)]

    def _snapshots_at(self, rows: Tensor, positions: Tensor) -> Tensor:
        """The slots for snapshots behind these rows' tokens; -1 where none is wanted."""
        wanted = self._snapshots[rows.clamp(min=0), positions // self._block_size]
        return torch.where((positions % self._block_size == self._block_size - 1) & (rows >= 0), wanted, -1)

    # -- steps that verify drafts --

    def begin_verifying(self, drafts: "Drafts") -> None:
        """The next step that is told of its states is one of these; can be captured, as all that follows."""
        self._drafts = drafts

    def _verifying(self, drafts: "Drafts", positions: Tensor, meta: AttentionMetadata) -> StepStates:
        """The tokens of a row follow each other. Requests are as many as places: those behind the last have none."""
        rows, offsets, *_ = drafts.places
        num_places, device = len(rows), rows.device
        is_first = (offsets == 0) | (rows < 0)
        request = torch.where(is_first, is_first.cumsum(0) - 1, num_places)
        index = torch.arange(num_places, dtype=torch.int32, device=device)

        def of_requests(values: Tensor, others: int) -> Tensor:
            """values: of places, of which each request's first counts."""
            filled = torch.full((num_places + 1,), others, dtype=torch.int32, device=device)
            return filled.scatter_(0, request, torch.where(is_first, values, others))

        starts, begins = of_requests(index, num_places), of_requests(positions, 0)[:-1]
        snapshots = torch.where(drafts.is_of_draft, self._slots_of(drafts), self._snapshots_at(rows, positions))
        told = replace(
            meta,
            query_start_loc=starts,
            seq_lens=begins + starts[1:] - starts[:-1],
            num_decodes=0,
            num_reqs=num_places,
            max_query_len=max(meta.max_query_len, self._most_places),
        )
        step_rows = of_requests(rows, -1)[:-1]
        return StepStates(step_rows, snapshots, told, self._layers, at_any_token=True)

    def _slots_of(self, drafts: "Drafts") -> Tensor:
        """Of places of rows with drafts, int32; what the others have means nothing."""
        offsets = drafts.places.offsets
        number = ((offsets == 0) & drafts.is_of_draft).cumsum(0).int() - 1  # among the step's rows with drafts
        return self._first_of_drafts + number * self._most_places + offsets

    def end_verifying(self, drafts: "Drafts", positions: Tensor, is_end: Tensor) -> None:
        """is_end [num_places]: 1 where the last token stands that counts for a row with a draft."""
        rows, offsets, *_ = drafts.places
        slots = self._slots_of(drafts)
        copy_states(self.states, slots, torch.where(drafts.is_of_draft & (is_end > 0), rows, -1))
        ends_before = is_end.cumsum(0) - is_end
        begins = torch.arange(len(rows), device=rows.device) - offsets
        counts = ends_before == ends_before[begins.clamp(min=0)]  # no end between its row's first place and it
        snapshots = self._snapshots_at(rows, positions)
        copy_states(self.states, slots, torch.where(drafts.is_of_draft & counts, snapshots, -1))


class Drafts(NamedTuple):
    """places: of a step's tokens. is_of_draft [num_places]: is its row one with a draft?"""

    places: Places
    is_of_draft: Tensor

    @classmethod
    def captured(cls, places: Places) -> "Drafts":
        """Of a step without prompts."""
        return cls(places, (places.rows >= 0) & ((places.offsets > 0) | (places.drafts >= 0)))
