"""ModelRunner: how a step runs on a device: upload, prepare, forward, sample, read back.

Owns the model, its KV cache and the batch state; `graphs/graph_runner.py` replays the same steps from CUDA graphs.
Invariant: a step is queued without waiting for the device; only `PendingTokens.result` waits.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend, ForwardContext, GroupInputs
from nanovllm.cache_specs import CacheGroups
from nanovllm.config import ModelConfig, ResolvedConfig
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput, TokenLogprobs
from nanovllm.kernels.attention_types import AttentionMetadata, LayerCache
from nanovllm.kernels.prepare_inputs import StepInputs, prepare_inputs
from nanovllm.kernels.triton.common.launch import dependent_launch
from nanovllm.runner.batch_state import BatchState
from nanovllm.runner.input_batch import InputBatch, InputStager
from nanovllm.sampling.rows import SampledRows, upload
from nanovllm.sampling.sampler import Sampler

if TYPE_CHECKING:
    from nanovllm.kernels.cascade import CascadeInputs
    from nanovllm.runner.cascade_items import CascadeItems
    from nanovllm.runner.layer_groups import LayerGroups


@dataclass(frozen=True)
class PendingTokens:
    """Sampled tokens on their way to the host; `event` is None where there is nothing to wait for."""

    tokens: Tensor
    event: torch.cuda.Event | None
    logprobs: Sequence[tuple[np.ndarray, Tensor]] = ()  # (which of the tokens, theirs), packed as all that follow
    prompt_logprobs: Sequence[Sequence[Tensor]] = ()  # per item of the plan's, in parts
    hidden_states: Sequence[dict[int | str, Tensor]] = ()  # as in `hidden_states.py`
    failures: dict[int, str] = field(default_factory=dict)  # as in ModelRunnerOutput

    def result(self) -> ModelRunnerOutput:
        if self.event is not None:
            self.event.synchronize()
        output = ModelRunnerOutput(
            token_ids=self.tokens.unsqueeze(1).tolist(), hidden_states=list(self.hidden_states), failures=self.failures
        )
        if self.logprobs:
            output.logprobs = [None] * len(output.token_ids)
        for members, top in self.logprobs:
            for member, entry in zip(members.tolist(), _entries(top), strict=True):
                output.logprobs[member] = None if member in self.failures else entry
        for parts in self.prompt_logprobs:
            output.prompt_logprobs.append([entry for top in parts for entry in _entries(top)])
        return output


def _entries(top: Tensor) -> list[TokenLogprobs]:
    data, size = top.numpy().tobytes(), top[0].numel() * top.element_size()
    return [data[start : start + size] for start in range(0, len(data), size)]


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
    ) -> None:
        """kv_caches as `runner/kv_cache.py` allocates them; tp: the ranks that share the model; groups: of its layers,
        one if not given.
        """
        self.model = model
        self.kv_caches = kv_caches
        self.backend = backend
        self.device = device
        self.block_size = config.block_size
        self.num_blocks = kv_caches[0].num_blocks
        max_blocks = -(-config.max_model_len // config.block_size)
        num_groups = len(groups.specs) if groups is not None else 1
        self.state = BatchState(config.max_num_seqs, max_blocks, device, num_groups)
        self.layer_groups = self._layer_groups(groups) if groups is not None and num_groups > 1 else None
        self._one_group = [0] * len(kv_caches)
        self._first_tables = self.state.block_tables[:, :max_blocks]  # of the first group
        processors = config.logits_processors
        self.sampler = Sampler(
            config.max_num_seqs, model_config.vocab_size, device, processors, config.deterministic, tp
        )
        # A step of several groups may be staged twice, in two parts.
        num_buffers = (config.overlap_depth + 1) * min(num_groups, 2)
        self._stager = InputStager(max_blocks * num_groups, num_buffers, device)
        self.cascade_items = self._cascade_items(model_config.num_heads // config.tensor_parallel_size)
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
        batch = self.stage(plan)
        with self._capturing(plan) as captured:
            hidden, seq_lens = self._forward(plan, batch)
        prompt_logprobs = self._score_prompts(plan, hidden) if plan.prompt_logprobs else ()
        if not len(batch.sampled_host):
            return self.read_back(batch.sampled, prompt_logprobs=prompt_logprobs, captured=captured)
        logits = self.model.compute_logits(hidden[batch.query_start_loc[1:][batch.sampled] - 1])
        rows = SampledRows(
            batch.rows_host[batch.sampled_host],
            batch.rows[batch.sampled],
            seq_lens_of(plan)[batch.sampled_host],
            seq_lens[batch.sampled],
        )
        tokens = self.sampler.sample(logits, rows)
        logprobs, failures = self.sampler.finish(logits, tokens, rows.rows_host)
        return self.read_back(tokens, logprobs, failures, prompt_logprobs, captured)

    def stage(self, plan: SchedulerOutput) -> InputBatch:
        """The plan on the device, its new rows and blocks in place."""
        batch = self._stager.stage(plan)
        self.state.apply(batch.new_rows, batch.new_blocks)
        return batch

    def _forward(self, plan: SchedulerOutput, batch: InputBatch) -> tuple[Tensor, Tensor]:
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
            max_seq_len=max(seq_lens),
            query_lens_host=plan.num_scheduled_tokens,
            seq_lens_host=seq_lens,
            cascade=self._cascade(plan) if plan.shared_prefixes else None,
        )
        rope_lens = self._rope_lens(plan, batch) if self._needs_rope_lens else None
        return self.run_model(batch.rows, inputs, meta, rope_lens), inputs.seq_lens

    def prepare(
        self,
        rows: Tensor,
        query_start_loc: Tensor,
        token_ids: Tensor,
        num_blocks: int,
        new_blocks: Tensor | None = None,
    ) -> StepInputs:
        """As `prepare_inputs`, of the rows here."""
        state = self.state
        return prepare_inputs(
            rows,
            query_start_loc,
            token_ids,
            self.sampler.columns.last_token,
            state.num_computed,
            self._first_tables,
            self.block_size,
            num_blocks,
            new_blocks,
        )

    def run_model(
        self, rows: Tensor, inputs: StepInputs, meta: AttentionMetadata, rope_lens: Tensor | None = None
    ) -> Tensor:
        """Hidden states [num_tokens, hidden_size]. rows, inputs: as `prepare` takes and returns them."""
        if self.layer_groups is None:
            groups, group_of_layer = [GroupInputs(self.backend.prepare(meta), inputs.slot_mapping)], self._one_group
        else:
            groups = self.layer_groups.inputs(rows, inputs.positions, meta, self.backend)
            group_of_layer = self.layer_groups.group_of_layer
        ctx = ForwardContext(
            kv_caches=self.kv_caches,
            backend=self.backend,
            groups=groups,
            group_of_layer=group_of_layer,
            rope_lens=rope_lens,
        )
        return self.model(inputs.input_ids, inputs.positions, ctx)

    def read_back(
        self,
        tokens: Tensor,
        logprobs: Sequence[tuple[np.ndarray, Tensor]] = (),
        failures: dict[int, str] | None = None,
        prompt_logprobs: Sequence[Sequence[Tensor]] = (),
        captured: Sequence[dict[int | str, Tensor]] = (),
    ) -> PendingTokens:
        """tokens and logprobs are on the device, everything else is on its way to the host already."""
        host = self.to_host(tokens)
        logprobs = [(members, self.to_host(top)) for members, top in logprobs]
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        return PendingTokens(host, event, logprobs, prompt_logprobs, captured, failures or {})

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy that the host does not wait for; the tensor itself on a CPU."""
        if self.device.type != "cuda":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    # -- what few requests, models or devices need, in leaves --

    def _layer_groups(self, groups: CacheGroups) -> "LayerGroups":
        from nanovllm.runner.layer_groups import LayerGroups

        return LayerGroups(groups, self.state.block_tables, self.block_size)

    def _cascade_items(self, num_heads: int) -> "CascadeItems | None":
        cache = self.kv_caches[0]
        num_programs = self.backend.num_cascade_programs(cache)
        if not num_programs:
            return None
        from nanovllm.runner.cascade_items import CascadeItems

        num_kv_heads = cache.data.shape[2]
        return CascadeItems(num_kv_heads, num_heads // num_kv_heads, num_programs)

    def _cascade(self, plan: SchedulerOutput) -> "CascadeInputs | None":
        if self.cascade_items is None:
            return None
        from nanovllm.kernels.cascade import cascade_inputs

        words = self.cascade_items.words(plan.shared_prefixes, plan.num_decodes)
        return cascade_inputs(upload(words, self.device), plan.num_decodes)

    def _capturing(self, plan: SchedulerOutput) -> AbstractContextManager[Sequence[dict[int | str, Tensor]]]:
        if not plan.capture_layers:
            return nullcontext(())
        from nanovllm.runner.hidden_states import captured_layers

        return captured_layers(self.model, plan.rows, plan.num_scheduled_tokens, plan.capture_layers, self.to_host)

    def _score_prompts(self, plan: SchedulerOutput, hidden: Tensor) -> list[list[Tensor]]:
        from nanovllm.runner.prompt_logprobs import score_prompts

        return score_prompts(plan, hidden, self.model, self.sampler, self.to_host)

    def _rope_lens(self, plan: SchedulerOutput, batch: InputBatch) -> Tensor:
        from nanovllm.runner.rope_lens import rope_lens

        return rope_lens(plan, self.state.rope_len[batch.rows_host], self.device)
