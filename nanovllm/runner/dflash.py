"""DFlashRunner: blocks of masks become drafts, in one pass of a DFlash head.

Owns the layout of such a pass: positions whose target's states are known, then the last token and its masks, each a
decode of its own; the tokens of a block see all of it, since each is given the block's whole length. Invariant: of the
target's rows only the block tables are touched, for the new blocks that the plan brings.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend, ForwardContext, GroupInputs
from nanovllm.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput
from nanovllm.kernels.attention_types import AttentionMetadata, LayerCache
from nanovllm.kernels.draft_places import Places, Unseen, prepare_places
from nanovllm.models.dflash import DFlashHead
from nanovllm.runner.extras import NO_EXTRAS
from nanovllm.runner.model_runner import ModelRunner, PendingTokens
from nanovllm.sampling.rows import upload


@dataclass(frozen=True)
class PendingBlocks(PendingTokens):
    """tokens [num_requests, num_tokens]."""

    def result(self) -> ModelRunnerOutput:
        if self.event is not None:
            self.event.synchronize()
        return ModelRunnerOutput(token_ids=self.tokens.tolist())


class DFlashRunner:
    def __init__(
        self,
        head: DFlashHead,
        mask_token_id: int,
        kv_caches: list[LayerCache],
        target: ModelRunner,
        backend: AttentionBackend,
    ) -> None:
        """kv_caches: of the head's layers, with as many blocks as the target's."""
        self._head, self._mask_token_id, self._kv_caches = head, mask_token_id, kv_caches
        self._target, self._backend = target, backend
        self.vocabulary = head.offsets

    @torch.inference_mode()
    def execute(self, plan: SchedulerOutput) -> PendingTokens:
        """plan: the known positions of each request, whose last token is the one behind them."""
        runner, device, length = self._target, self._target.device, plan.num_draft_steps
        if plan.new_blocks:
            width = runner.state.block_tables.shape[1]
            places = [(row * width + index, block) for row, index, block in plan.new_blocks]
            blocks = upload(np.array(places, dtype=np.int32), device)
            runner.state.apply(blocks[:0], blocks)
        words, masks = self._lay_out(plan, length)
        rows, positions, token_ids, is_known, seq_lens = upload(words, device).unbind(0)
        num_blocks = -(-int(words[4].max()) // runner.block_size)
        tables = runner.state.block_tables[rows.long(), :num_blocks]
        slots = tables.gather(1, (positions // runner.block_size).long().unsqueeze(1)).squeeze(1).long()
        slots = slots * runner.block_size + positions % runner.block_size
        hidden = self._head(
            token_ids, positions, is_known.bool(), self._context(slots, seq_lens, tables, words[4].tolist())
        )
        if not len(masks):
            return PendingBlocks(torch.zeros(0, length, dtype=torch.int32), None, NO_EXTRAS)
        ids = self._head.compute_logits(hidden[upload(masks, device)]).argmax(-1).int()
        pending = runner.read_back(self._head.as_target(ids).view(-1, length))
        return PendingBlocks(pending.tokens, pending.event, NO_EXTRAS)

    def draft(self, unseen: Unseen, num_computed: Tensor, length: int) -> Tensor:
        """See `DraftPasses`: the same pass inside a captured step."""
        rows, limits, token_ids = unseen.rows, unseen.limits, unseen.token_ids
        runner, (n, width) = self._target, token_ids.shape
        offsets = torch.arange(-width, 1 + length, dtype=torch.int32, device=rows.device).expand(n, -1)
        is_known = offsets < 0
        given = torch.full_like(offsets, self._mask_token_id)
        given[:, width] = token_ids[:, -1]
        has_place = torch.cat((token_ids >= 0, offsets[:, width:] <= limits[:, None]), dim=1)
        places_rows = torch.where(has_place, rows[:, None], -1).flatten()
        tables = runner.state.block_tables[:, : runner.state.max_blocks]
        places = Places(places_rows, offsets.flatten(), given.flatten(), given.flatten())
        inputs = prepare_places(places, num_computed, tables, runner.block_size, tables.shape[1])
        ends = (num_computed[rows.clamp(min=0)] + 1 + limits)[:, None]
        seq_lens = torch.where(has_place & ~is_known, ends, inputs.seq_lens.view(n, -1)).flatten()
        max_len = tables.shape[1] * runner.block_size
        # Whole tables: a mask sees the end of its block, and those of `inputs` may end at each place's own position.
        context = self._context(
            inputs.slot_mapping, seq_lens, tables[places_rows.clamp(min=0)], [max_len] * len(seq_lens)
        )
        hidden = self._head(inputs.input_ids, inputs.positions, is_known.flatten(), context)
        masks = hidden.view(n, -1, hidden.shape[-1])[:, width + 1 :]
        return self._head.compute_logits(masks.flatten(0, 1)).argmax(-1).int().view(n, length).T.contiguous()

    def _lay_out(self, plan: SchedulerOutput, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows, positions, tokens, whether states are known, and lengths, int32 [5, n]; where the masks are [m]."""
        parts, masks, first, num_places = [], [], 0, 0
        columns = plan.rows, plan.num_computed_tokens, plan.num_scheduled_tokens, plan.num_samples
        for row, start, count, samples in zip(*columns, strict=True):
            end, size = start + count, count + (1 + length if samples else 0)
            part = np.zeros((5, size), dtype=np.int32)
            part[0], part[1], part[2] = row, np.arange(start, start + size), self._mask_token_id
            part[3, :count], part[4] = 1, np.where(np.arange(size) < count, part[1] + 1, end + 1 + length)
            if samples:
                part[2, count] = plan.token_ids[first + count - 1]
                masks.append(num_places + count + 1 + np.arange(length))
            parts.append(part)
            first, num_places = first + count, num_places + size
        return np.concatenate(parts, axis=1), np.concatenate(masks) if masks else np.zeros(0, dtype=np.int64)

    def _context(self, slots: Tensor, seq_lens: Tensor, tables: Tensor, lens: list[int]) -> ForwardContext:
        n = len(lens)
        meta = AttentionMetadata(
            query_start_loc=torch.arange(n + 1, dtype=torch.int32, device=slots.device),
            seq_lens=seq_lens.contiguous(),
            block_table=tables.contiguous(),
            slot_mapping=slots,
            num_decodes=n,
            num_reqs=n,
            max_query_len=1,
            query_lens_host=[1] * n,
            seq_lens_host=lens,
            reads_step=True,
        )
        return ForwardContext(
            kv_caches=self._kv_caches,
            backend=self._backend,
            groups=[GroupInputs(self._backend.prepare(meta), slots)],
            group_of_layer=[0] * len(self._kv_caches),
        )
