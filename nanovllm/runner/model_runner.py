"""ModelRunner: how a step runs on a device: upload, prepare, forward, sample, read back.

Owns the model, its KV cache and the batch state; `graphs/graph_runner.py` replays the same steps from CUDA graphs.
Invariant: a step is queued without waiting for the device; only `PendingTokens.result` waits.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend, ForwardContext, GroupInputs
from nanovllm.cache_specs import CacheGroups
from nanovllm.config import ResolvedConfig
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput
from nanovllm.kernels.attention_types import AttentionMetadata, LayerCache
from nanovllm.kernels.prepare_inputs import StepInputs, prepare_inputs
from nanovllm.kernels.triton.common.launch import dependent_launch
from nanovllm.model_config import ModelConfig
from nanovllm.runner.batch_state import BatchState
from nanovllm.runner.cascade_items import CascadeItems
from nanovllm.runner.extras import NO_EXTRAS, PendingExtras, run_with_hidden_states
from nanovllm.runner.input_batch import InputBatch, InputStager
from nanovllm.runner.kv_cache import MakeZeros, zeros
from nanovllm.runner.layer_groups import LayerGroups
from nanovllm.runner.rope_lens import rope_lens
from nanovllm.runner.stateful_rows import StatefulRows
from nanovllm.sampling.rows import SampledRows
from nanovllm.sampling.sampler import Sampler


@dataclass(frozen=True)
class PendingTokens:
    """Sampled tokens on their way to the host; `event` is None where there is nothing to wait for."""

    tokens: Tensor
    event: torch.cuda.Event | None
    extras: PendingExtras

    def result(self) -> ModelRunnerOutput:
        if self.event is not None:
            self.event.synchronize()
        output = ModelRunnerOutput(token_ids=self.tokens.unsqueeze(1).tolist())
        if self.extras is not NO_EXTRAS:
            self.extras.add_to(output)
        return output


def seq_lens_of(plan: SchedulerOutput) -> np.ndarray:
    """Tokens of each request after this step, [num_reqs]; a token that it samples will stand there."""
    return np.array(plan.num_computed_tokens) + np.array(plan.num_scheduled_tokens)


class ModelRunner:
    """Launches each step kernel by kernel."""

    def __init__(
        self,
        config: ResolvedConfig,
        model_config: ModelConfig,
        model: Any,
        kv_caches: list[LayerCache],
        backend: AttentionBackend,
        device: torch.device,
        tp: TensorParallel | None = None,
        groups: CacheGroups | None = None,
        make: MakeZeros = zeros,
    ) -> None:
        """kv_caches as `runner/kv_cache.py` allocates them; tp: the ranks that share the model; groups: of its layers,
        one if not given. make: what the layers keep beside them.
        """
        self.model = model
        self.kv_caches = kv_caches
        self.backend = backend
        self.device = device
        self.block_size = config.block_size
        self.num_blocks = kv_caches[0].num_blocks
        max_blocks = -(-config.max_model_len // config.block_size)
        num_groups = groups.num_tables if groups is not None else 1
        self.state = BatchState(config.max_num_seqs, max_blocks, device, num_groups)
        self.layer_groups: LayerGroups | StatefulRows | None = None
        if groups is not None and groups.state_layers:
            self.state = self.layer_groups = StatefulRows(config, model_config, groups, self.num_blocks, device, make)
        elif groups is not None and num_groups > 1:
            self.layer_groups = LayerGroups(groups, self.state.block_tables, self.block_size)
        self._one_group = [0] * len(kv_caches)
        self._first_tables = self.state.block_tables[:, :max_blocks]  # of the first group
        how = config.logits_processors, config.deterministic, tp, config.logprobs_mode
        self.sampler = Sampler(config.max_num_seqs, model_config.vocab_size, device, *how)
        # A step of several groups may be staged twice, in two parts.
        num_buffers = (config.overlap_depth + 1) * min(num_groups, 2)
        self._stager = InputStager(max_blocks * num_groups, num_buffers, device)
        self.cascade_items = None
        if num_programs := backend.num_cascade_programs(kv_caches[0]):
            num_kv_heads = kv_caches[0].data.shape[2]
            group = model_config.num_heads // config.tensor_parallel_size // num_kv_heads
            self.cascade_items = CascadeItems(num_kv_heads, group, num_programs)
        self._needs_rope_lens = model_config.length_dependent_from is not None or model_config.long_from is not None
        self._dependent_launch = config.dependent_launch

    @torch.inference_mode()
    def execute(self, plan: SchedulerOutput) -> PendingTokens:
        """Queue one step."""
        with dependent_launch(self._dependent_launch):
            self.enter(plan)
            return self.run(plan)

    def enter(self, plan: SchedulerOutput) -> None:
        """The host's part of new rows and tokens, once for each plan."""
        self.state.enter(plan)
        self.sampler.enter(plan)

    def run(self, plan: SchedulerOutput) -> PendingTokens:
        """The device's part of a plan that has entered, or of a part of one."""
        if plan.prompt_logprobs or plan.capture_layers or plan.num_draft_tokens:
            return run_with_hidden_states(self, plan)
        batch = self.stage(plan)
        hidden, seq_lens = self.forward(plan, batch)
        return self.sample(plan, batch, hidden, seq_lens, NO_EXTRAS)

    def stage(self, plan: SchedulerOutput) -> InputBatch:
        """The plan on the device, its new rows and blocks in place."""
        batch = self._stager.stage(plan)
        self.state.apply(batch.new_rows, batch.new_blocks)
        return batch

    def forward(self, plan: SchedulerOutput, batch: InputBatch) -> tuple[Tensor, Tensor]:
        """Any mixture of requests: hidden states [num_tokens, hidden_size], seq_lens [num_reqs]."""
        seq_lens = seq_lens_of(plan).tolist()
        num_blocks = -(-max(seq_lens) // self.block_size)
        inputs = self.prepare(batch.rows, batch.query_start_loc, batch.token_ids, num_blocks)
        meta = AttentionMetadata(
            query_start_loc=batch.query_start_loc,
            seq_lens=inputs.seq_lens,
            block_table=inputs.block_table,
            slot_mapping=inputs.slot_mapping,
            num_decodes=plan.num_decodes,
            num_reqs=len(seq_lens),
            max_query_len=max(plan.num_scheduled_tokens),
            query_lens_host=plan.num_scheduled_tokens,
            seq_lens_host=seq_lens,
            cascade=None if self.cascade_items is None else self.cascade_items.upload(plan, self.device),
        )
        lens = rope_lens(plan, self.state.rope_len[batch.rows_host], self.device) if self._needs_rope_lens else None
        return self.run_model(batch.rows, inputs, meta, lens), inputs.seq_lens

    def sample(
        self, plan: SchedulerOutput, batch: InputBatch, hidden: Tensor, seq_lens: Tensor, extras: PendingExtras
    ) -> PendingTokens:
        """hidden, seq_lens: as `forward` returns them. extras: of the step, queued before."""
        if not len(batch.sampled_host):
            return self.read_back(batch.sampled, extras)
        rows = SampledRows(
            batch.rows_host[batch.sampled_host],
            batch.rows[batch.sampled],
            seq_lens_of(plan)[batch.sampled_host],
            seq_lens[batch.sampled],
        )
        logits = self.compute_logits(hidden[batch.query_start_loc[1:][batch.sampled] - 1], rows.rows)
        tokens = self.sampler.sample(logits, rows)
        if self.sampler.pipeline is not None:
            extras = extras.of_sampled(self, logits, tokens, rows)
        return self.read_back(tokens, extras)

    def prepare(
        self, rows: Tensor, starts: Tensor, token_ids: Tensor, num_blocks: int, new_blocks: Tensor | None = None
    ) -> StepInputs:
        """As `prepare_inputs`, of the rows here; starts: its query_start_loc."""
        last_token, num_computed = self.sampler.columns.last_token, self.state.num_computed
        state = last_token, num_computed, self._first_tables, self.block_size
        return prepare_inputs(rows, starts, token_ids, *state, num_blocks, new_blocks)

    def run_model(
        self, rows: Tensor, inputs: StepInputs, meta: AttentionMetadata, rope_lens: Tensor | None = None
    ) -> Tensor:
        """Hidden states [num_tokens, hidden_size]. rows, inputs: as `prepare` takes and returns them."""
        if self.layer_groups is None:
            groups, of_layer = [GroupInputs(self.backend.prepare(meta), inputs.slot_mapping)], self._one_group
        else:
            groups = self.layer_groups.inputs(rows, inputs.positions, meta, self.backend)
            of_layer = self.layer_groups.group_of_layer
        ctx = ForwardContext(
            kv_caches=self.kv_caches, backend=self.backend, groups=groups, group_of_layer=of_layer, rope_lens=rope_lens
        )
        return self.model(inputs.input_ids, inputs.positions, ctx)

    def compute_logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """hidden [n, hidden_size], each of one of the rows [n] -> logits [n, vocab_size]."""
        return self.model.compute_logits(hidden)  # type: ignore[no-any-return]

    def read_back(self, tokens: Tensor, extras: PendingExtras = NO_EXTRAS) -> PendingTokens:
        """tokens are on the device, the extras on their way to the host already."""
        host, event = self.to_host(tokens), None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        return PendingTokens(host, event, extras)

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy that the host does not wait for; the tensor itself on a CPU."""
        if self.device.type != "cuda":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)
