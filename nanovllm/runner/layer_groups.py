"""LayerGroups: the block tables and slots of a step for models whose layers keep different things.

Owns how a row's tables lie side by side on the device. Invariant: what a step of the first group is told comes from
`prepare_inputs`, as of any model; the other groups' tables are read at the same positions, in a few operations for all.
"""

from dataclasses import replace

import torch
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend, GroupInputs
from nanovllm.cache_specs import CacheGroups
from nanovllm.kernels.attention_types import AttentionMetadata


class LayerGroups:
    def __init__(self, groups: CacheGroups, block_tables: Tensor, block_size: int) -> None:
        """block_tables [max_num_seqs, num_groups * max_blocks]: of each row, as `BatchState` has them."""
        group_of = {layer: group for group, layers in enumerate(groups.layers) for layer in layers}
        self.group_of_layer = [group_of[groups.source(layer)] for layer in range(groups.num_layers)]
        self._tables = block_tables.view(block_tables.shape[0], len(groups.specs), -1)
        self._block_size = block_size

    def inputs(
        self, rows: Tensor, positions: Tensor, meta: AttentionMetadata, backend: AttentionBackend
    ) -> list[GroupInputs]:
        """rows [num_reqs], -1 for padding; positions [num_tokens]; meta: of the first group. Can be captured."""
        num_blocks = meta.block_table.shape[1]
        tables = self._tables[rows.clamp(min=0)]  # [num_reqs, num_groups, max_blocks]
        index = torch.arange(len(positions), dtype=torch.int32, device=positions.device)
        request = torch.searchsorted(meta.query_start_loc[1:], index, right=True).clamp(max=len(rows) - 1)
        blocks = tables[request, :, positions // self._block_size]  # [num_tokens, num_groups]
        slots = blocks.long() * self._block_size + (positions % self._block_size).unsqueeze(1)
        slots = slots.masked_fill_((meta.slot_mapping < 0).unsqueeze(1), -1)
        metas = [meta] + [
            replace(
                meta,
                block_table=tables[:, group, :num_blocks].contiguous(),
                slot_mapping=slots[:, group].contiguous(),
            )
            for group in range(1, tables.shape[1])
        ]
        return [GroupInputs(backend.prepare(meta), meta.slot_mapping) for meta in metas]
