"""StatefulRows: rows of a model some of whose layers keep states, and what a step of it is told.

        row | num_computed | block_table ... | snapshots ...          and in every layer with a state: rows | snapshots

Owns the states' tensors, and the table that says at the ends of which blocks a row's state is copied to which slot.
Invariant: a row that begins with tokens behind it has the state of the snapshot that its table has for the last of
their blocks; from then on its table has what its own plans put there.
"""

import torch
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend, GroupInputs
from nanovllm.cache_specs import CacheGroups
from nanovllm.config import ModelConfig, ResolvedConfig
from nanovllm.kernels.attention_types import AttentionMetadata
from nanovllm.kernels.state_types import LayerState, StepStates
from nanovllm.runner.batch_state import BatchState
from nanovllm.runner.kv_cache import MakeZeros, zeros


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
        memory = model_config.state_memory(config)
        assert memory is not None and model_config.state is not None and len(groups.specs) == 1
        shape = model_config.state.part(config.tensor_parallel_size)
        slots = memory.slots(config.max_num_seqs, num_blocks)
        self.states = make((len(groups.state_layers), slots.stop, shape.num_floats), torch.float32, device)
        self.group_of_layer = [int(layer in groups.state_layers) for layer in range(groups.num_layers)]
        self._snapshots = self.block_tables[:, max_blocks:]
        self._snapshots.fill_(-1)
        self._block_size = config.block_size
        num_inputs = shape.conv_channels * (shape.conv_width - 1)
        self._layers = {
            layer: LayerState(
                states[:, :num_inputs].view(slots.stop, shape.conv_width - 1, shape.conv_channels),
                states[:, num_inputs:].view(slots.stop, shape.num_heads, shape.key_dim, shape.value_dim),
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
        index = torch.arange(len(positions), dtype=torch.int32, device=positions.device)
        request = torch.searchsorted(meta.query_start_loc[1:], index, right=True).clamp(max=len(rows) - 1)
        ends = (positions % self._block_size == self._block_size - 1) & (meta.slot_mapping >= 0)
        snapshots = self._snapshots[rows.clamp(min=0)[request], positions // self._block_size]
        snapshots = torch.where(ends, snapshots, -1)
        step = StepStates(rows, snapshots, meta, self._layers)
        return [GroupInputs(backend.prepare(meta), meta.slot_mapping), GroupInputs(step, snapshots)]
