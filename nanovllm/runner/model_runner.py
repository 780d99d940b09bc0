"""ModelRunner: how a step runs on a device: upload, prepare, forward, sample, read back.

Owns the model, its KV cache and the batch state. Invariant: a step is queued without waiting for the device; only
`PendingTokens.result` waits.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend, ForwardContext
from nanovllm.attention.metadata import AttentionMetadata
from nanovllm.config import EngineConfig, ModelConfig
from nanovllm.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput
from nanovllm.kernels.prepare_inputs import StepInputs, prepare_inputs
from nanovllm.runner.batch_state import BatchState
from nanovllm.runner.cuda_graphs import DecodeGraphs, DecodeInputs
from nanovllm.runner.input_batch import InputBatch, InputStager
from nanovllm.sampling.sampler import Sampler


@dataclass(frozen=True)
class PendingTokens:
    """Sampled tokens on their way to the host; `event` is None where there is nothing to wait for."""

    tokens: Tensor
    event: torch.cuda.Event | None

    def result(self) -> ModelRunnerOutput:
        if self.event is not None:
            self.event.synchronize()
        return ModelRunnerOutput(token_ids=self.tokens.tolist())


class ModelRunner:
    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        model: Any,
        kv_caches: list[Tensor],
        backend: AttentionBackend,
        device: torch.device,
    ) -> None:
        """config is resolved; kv_caches as `runner/kv_cache.py` allocates them."""
        assert config.max_model_len and config.block_size and config.max_num_seqs and config.overlap_depth
        self.model = model
        self.kv_caches = kv_caches
        self.backend = backend
        self.device = device
        self.block_size = config.block_size
        self.num_blocks = kv_caches[0].shape[1]
        self._has_dynamic_rope = model_config.rope.rope_type == "dynamic"
        max_blocks = -(-config.max_model_len // config.block_size)
        self.state = BatchState(config.max_num_seqs, max_blocks, model_config.vocab_size, device)
        self.sampler = Sampler(self.state.sampling)
        num_buffers = config.overlap_depth + 1
        self._stager = InputStager(max_blocks, num_buffers, device)
        self._graphs: DecodeGraphs | None = None
        if device.type == "cuda" and not config.enforce_eager and not self._has_dynamic_rope:
            self._graphs = DecodeGraphs(self._decode, config.max_num_seqs, self.state.nowhere, num_buffers, device)

    @torch.inference_mode()
    def execute(self, plan: SchedulerOutput) -> PendingTokens:
        """Queue one step."""
        if self._graphs is not None and self._is_plain_decode(plan):
            self.state.sampling.upload()
            places = [(row * self.state.max_blocks + index, block_id) for row, index, block_id in plan.new_blocks]
            return self._read_back(self._graphs.run(plan.rows, plan.token_ids, places))
        batch = self._stager.stage(plan)
        self.state.enter(plan.new_rows)
        self.state.apply(batch.new_rows, batch.new_blocks)
        hidden, seq_lens = self._forward(plan, batch)
        if not len(batch.sampled_host):
            return self._read_back(batch.sampled)
        logits = self.model.compute_logits(hidden[batch.query_start_loc[1:][batch.sampled] - 1])
        rows = batch.rows[batch.sampled]
        tokens = self.sampler.sample(logits, batch.rows_host[batch.sampled_host], rows, seq_lens[batch.sampled])
        self.state.last_token[rows] = tokens
        return self._read_back(tokens)

    def _is_plain_decode(self, plan: SchedulerOutput) -> bool:
        """One token for each of some rows that run already, sampled as the device can by itself."""
        is_decode = plan.num_decodes == len(plan.rows) and not plan.new_rows and all(plan.samples)
        return is_decode and not self.sampler.needs_host(np.array(plan.rows))

    def _forward(self, plan: SchedulerOutput, batch: InputBatch) -> tuple[Tensor, Tensor]:
        """Any mixture of requests: hidden states [num_tokens, hidden_size], seq_lens [num_reqs]."""
        inputs = self._prepare(batch.rows, batch.query_start_loc, batch.token_ids)
        seq_lens = [a + b for a, b in zip(plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True)]
        num_blocks = -(-max(seq_lens) // self.block_size)
        meta = AttentionMetadata(
            query_start_loc=batch.query_start_loc,
            seq_lens=inputs.seq_lens,
            block_table=self.state.block_tables[batch.rows, :num_blocks],
            slot_mapping=inputs.slot_mapping,
            num_decodes=plan.num_decodes,
            num_reqs=len(seq_lens),
            max_query_len=max(plan.num_scheduled_tokens),
            max_seq_len=max(seq_lens),
            query_lens_host=plan.num_scheduled_tokens,
            seq_lens_host=seq_lens,
        )
        rope_lens = self._rope_lens(plan, batch) if self._has_dynamic_rope else None
        return self._run_model(inputs, meta, rope_lens), inputs.seq_lens

    def _decode(self, inputs: DecodeInputs, query_start_loc: Tensor) -> Tensor:
        """A whole decode step on the device, to be captured: every size comes from the inputs' shapes."""
        size, max_len = inputs.rows.shape[0], self.state.max_blocks * self.block_size
        self.state.set_blocks(inputs.new_places, inputs.new_blocks)
        step = self._prepare(inputs.rows, query_start_loc, inputs.token_ids)
        safe_rows = torch.where(inputs.rows < 0, self.state.spare_row, inputs.rows)
        meta = AttentionMetadata(
            query_start_loc=query_start_loc,
            seq_lens=step.seq_lens,
            block_table=self.state.block_tables[safe_rows],
            slot_mapping=step.slot_mapping,
            num_decodes=size,
            num_reqs=size,
            max_query_len=1,
            max_seq_len=max_len,
            query_lens_host=[1] * size,
            seq_lens_host=[max_len] * size,
        )
        logits = self.model.compute_logits(self._run_model(step, meta, None))
        tokens = self.sampler.sample_captured(logits, inputs.rows, step.seq_lens)
        self.state.last_token[safe_rows] = tokens
        return tokens

    def _prepare(self, rows: Tensor, query_start_loc: Tensor, token_ids: Tensor) -> StepInputs:
        state = self.state
        return prepare_inputs(
            rows,
            query_start_loc,
            token_ids,
            state.last_token,
            state.num_computed,
            state.block_tables,
            self.block_size,
        )

    def _run_model(self, inputs: StepInputs, meta: AttentionMetadata, rope_lens: Tensor | None) -> Tensor:
        ctx = ForwardContext(
            kv_caches=self.kv_caches,
            backend=self.backend,
            prepared=self.backend.prepare(meta),
            slot_mapping=inputs.slot_mapping,
            rope_lens=rope_lens,
        )
        return self.model(inputs.input_ids, inputs.positions, ctx)

    def _rope_lens(self, plan: SchedulerOutput, batch: InputBatch) -> Tensor:
        """Per token, the context it counts as part of: its whole prompt, or all up to an output token itself."""
        prompts = self.state.num_prompt_tokens[batch.rows_host]
        lens = [
            np.maximum(prompt, np.arange(start + 1, start + count + 1))
            for prompt, start, count in zip(prompts, plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True)
        ]
        return torch.from_numpy(np.concatenate(lens)).to(self.device)

    def _read_back(self, tokens: Tensor) -> PendingTokens:
        if self.device.type != "cuda":
            return PendingTokens(tokens, None)
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return PendingTokens(host, event)
