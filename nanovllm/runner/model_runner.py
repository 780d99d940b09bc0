"""ModelRunner: how a step runs on a device: upload, prepare, forward, sample, read back.

Owns the model, its KV cache and the batch state. Invariant: a step is queued without waiting for the device; only
`PendingTokens.result` waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend, ForwardContext
from nanovllm.config import ModelConfig, ResolvedConfig
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput, TokenLogprobs
from nanovllm.kernels.attention_types import AttentionMetadata, LayerCache
from nanovllm.kernels.cascade import CascadeInputs, cascade_inputs
from nanovllm.kernels.dependent_launch import dependent_launch
from nanovllm.kernels.prepare_inputs import StepInputs, prepare_inputs
from nanovllm.kernels.take_rows import take_rows
from nanovllm.runner.batch_state import BatchState
from nanovllm.runner.captured_steps import CascadeLayout, DecodeInputs, DecodeLayout, PromptInputs, PromptLayout
from nanovllm.runner.cascade_items import CascadeItems
from nanovllm.runner.cuda_graphs import GraphPool, StepGraphs, can_capture, compile_kernels, padding
from nanovllm.runner.hidden_states import Captured, captured_layers
from nanovllm.runner.input_batch import InputBatch, InputStager
from nanovllm.runner.step_parts import PendingParts, StepParts, split
from nanovllm.sampling.logprobs import CHUNK, packed, top_logprobs
from nanovllm.sampling.sampler import Sampler
from nanovllm.sampling.state import upload

# Of the layers' weights: an H200 reads as many in 2 ms, and a host takes 14 to launch 28 layers kernel by kernel.
LIGHT_BYTES = 8 * 2**30


@dataclass(frozen=True)
class PendingTokens:
    """Sampled tokens on their way to the host; `event` is None where there is nothing to wait for."""

    tokens: Tensor
    event: torch.cuda.Event | None
    logprobs: Sequence[tuple[np.ndarray, Tensor]] = ()  # (which of the tokens, theirs), packed as all that follow
    prompt_logprobs: Sequence[Sequence[Tensor]] = ()  # per item of the plan's, in parts
    hidden_states: Captured = ()
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


def _seq_lens(plan: SchedulerOutput) -> np.ndarray:
    """Tokens of each request after this step, [num_reqs]; a token that it samples will stand there."""
    return np.array(plan.num_computed_tokens) + np.array(plan.num_scheduled_tokens)


class ModelRunner:
    def __init__(
        self,
        config: ResolvedConfig,
        model_config: ModelConfig,
        model: Any,
        kv_caches: list[LayerCache],
        backend: AttentionBackend,
        device: torch.device,
        tp: TensorParallel | None = None,
    ) -> None:
        """config is resolved; kv_caches as `runner/kv_cache.py` allocates them; tp: the ranks that share the model."""
        self.model = model
        self.kv_caches = kv_caches
        self.backend = backend
        self.device = device
        self._dependent_launch = config.dependent_launch
        self.block_size = config.block_size
        self.num_blocks = kv_caches[0].num_blocks
        is_dynamic = model_config.length_dependent_from is not None
        self._needs_rope_lens = is_dynamic or model_config.long_from is not None
        max_blocks = -(-config.max_model_len // config.block_size)
        self.state = BatchState(
            config.max_num_seqs, max_blocks, model_config.vocab_size, device, config.logits_processors
        )
        self.sampler = Sampler(self.state.sampling, config.deterministic, tp)
        num_buffers = config.overlap_depth + 1
        self._stager = InputStager(max_blocks, num_buffers, device)
        num_kv_heads = kv_caches[0].data.shape[2]
        group = model_config.num_heads // config.tensor_parallel_size // num_kv_heads
        num_programs = backend.num_cascade_programs(kv_caches[0])
        self._cascade_items = CascadeItems(num_kv_heads, group, num_programs) if num_programs else None
        self._decodes = DecodeLayout(config.max_num_seqs)
        self._prompts = PromptLayout()
        self._can_capture = can_capture(device) and not is_dynamic
        self._has_graphs = self._can_capture and not config.enforce_eager
        self.splits_captures = self._has_graphs
        # Of the layers alone: their share is the same on every rank, and all ranks must decide alike.
        weight_bytes = sum(weight.numel() * weight.element_size() for weight in model.layers.parameters())
        self._splits_prompts = self._has_graphs and not self._needs_rope_lens and weight_bytes <= LIGHT_BYTES
        # NCCL connects at the first sum, and torch.compile compiles what it is about to run.
        self._runs_first = config.tensor_parallel_size > 1 or config.compilation == "inductor"
        if self._can_capture:
            self._starts = torch.arange(config.max_num_seqs + 1, dtype=torch.int32, device=device)
        if self._has_graphs:
            how = num_buffers, device, GraphPool(device), self._runs_first
            self._decode_graphs = StepGraphs(self._decode, self._decodes, config.max_num_seqs, *how)
            self._prompt_graphs = StepGraphs(self._run_prompts, self._prompts, self._prompts.largest, *how)
            if self._cascade_items is not None:
                cascades = CascadeLayout(self._decodes, self._cascade_items)
                self._cascade_graphs = StepGraphs(self._decode_cascade, cascades, config.max_num_seqs, *how)
            with dependent_launch(self._dependent_launch):
                self._decode_graphs.capture(config.max_num_seqs)  # the largest first: the others fit into its memory

    @torch.inference_mode()
    def compile_ahead(self) -> None:
        """Compile, side by side, most kernels of large steps, be they captured or not. No request must be there yet."""
        if not self._can_capture or self._runs_first:
            return
        decodes = padding(self._decodes, self._decodes.sizes[-1], self.device)
        prompts = padding(self._prompts, self._prompts.largest, self.device)
        cascades = []
        if self._cascade_items is not None:
            layout, sizes = CascadeLayout(self._decodes, self._cascade_items), self._decodes.sizes
            few = max(size for size in sizes if size <= 16)  # for these, kernels have another shape
            cascades = [padding(layout, size, self.device) for size in sorted({few, sizes[-1]})]

        def steps() -> None:
            _, logits = self._decode(decodes)
            for inputs in cascades:
                self._decode_cascade(inputs)
            some = decodes.rows[:64]
            self.sampler.sample_captured(logits[:64].float(), some, some)  # as of rows whose logits are edited
            if not self._needs_rope_lens:
                self._run_prompts(prompts)

        with dependent_launch(self._dependent_launch):
            compile_kernels(steps, self.device)

    @torch.inference_mode()
    def execute(self, plan: SchedulerOutput) -> PendingTokens | PendingParts:
        """Queue one step."""
        with dependent_launch(self._dependent_launch):
            self.state.enter(plan)
            parts = self._parts(plan)
            if parts is None:
                return self._execute(plan)
            rest = self._execute(parts.rest)
            return PendingParts(self._execute(parts.own), rest, parts.is_own_token)

    def _parts(self, plan: SchedulerOutput) -> StepParts | None:
        """Two parts, if the decodes can have their CUDA graph by themselves and not with what runs beside them.

        That is requests that capture hidden states; or prompts, which are captured, but not beside so many requests or
        such long ones. There, reading the weights twice takes less time than launching every kernel, if they are few.
        """
        num_prompt_tokens = len(plan.token_ids) - plan.num_decodes
        if plan.capture_layers and self.splits_captures:
            parts = split(plan, [row in plan.capture_layers for row in plan.rows])
        elif (
            self._splits_prompts
            and plan.num_decodes
            and 0 < num_prompt_tokens <= self._prompts.num_tokens[-1]
            and self._prompts.size(plan) is None
        ):
            new_rows = {new.row for new in plan.new_rows}
            parts = split(plan, [i >= plan.num_decodes or row in new_rows for i, row in enumerate(plan.rows)])
            if parts.own.prompt_logprobs or self._prompts.size(parts.own) is None:
                return None
        else:
            return None
        is_decode = bool(parts.rest.rows) and self._decodes.size(parts.rest) is not None
        return parts if is_decode and not parts.rest.prompt_logprobs else None

    def _execute(self, plan: SchedulerOutput) -> PendingTokens:
        needs_hidden_states = plan.prompt_logprobs or plan.capture_layers  # a graph leaves none
        if self._has_graphs and not needs_hidden_states:
            self.state.sampling.upload()
            if (size := self._decodes.size(plan)) is not None:
                graphs = self._cascade_graphs if plan.shared_prefixes else self._decode_graphs
                return self._finish(plan, *graphs.run(size, plan))
            if not self._needs_rope_lens and (prompt_size := self._prompts.size(plan)) is not None:
                batch = self._stager.stage(plan)
                self.state.apply(batch.new_rows, batch.new_blocks)
                return self._finish(plan, *self._prompt_graphs.run(prompt_size, plan))
        batch = self._stager.stage(plan)
        self.state.apply(batch.new_rows, batch.new_blocks)
        step = plan.rows, plan.num_scheduled_tokens, plan.capture_layers
        with captured_layers(self.model, *step, self._to_host) as captured:
            hidden, seq_lens = self._forward(plan, batch)
        prompt_logprobs = [self._score_prompt(plan, hidden, *item) for item in plan.prompt_logprobs]
        if not len(batch.sampled_host):
            return self._read_back(batch.sampled, (), prompt_logprobs, captured)
        logits = self.model.compute_logits(hidden[batch.query_start_loc[1:][batch.sampled] - 1])
        rows = batch.rows[batch.sampled]
        rows_host, positions_host = batch.rows_host[batch.sampled_host], _seq_lens(plan)[batch.sampled_host]
        tokens = self.sampler.sample(logits, rows_host, rows, positions_host, seq_lens[batch.sampled])
        logprobs = self.sampler.logprobs(logits, tokens, rows_host)
        return self._read_back(tokens, logprobs, prompt_logprobs, captured, self.sampler.take_failures(rows_host))

    def _finish(self, plan: SchedulerOutput, tokens: Tensor, logits: Tensor) -> PendingTokens:
        """Queue what a graph cannot do for some rows, edits of logits and log-probabilities, behind its replay.

        tokens, logits: as the graph left them, padding's behind the others.
        """
        num_sampled = sum(plan.num_samples)
        tokens, logits = tokens[:num_sampled], logits[:num_sampled]
        if self.state.sampling.is_plain(plan.rows):
            return self._read_back(tokens)
        sampled = np.flatnonzero(plan.num_samples)
        rows_host, positions_host = np.array(plan.rows)[sampled], _seq_lens(plan)[sampled]
        edited = np.flatnonzero(self.sampler.needs_edits(rows_host, positions_host))
        if len(edited):
            rows, positions = upload(np.stack((rows_host, positions_host)).astype(np.int32), self.device).unbind(0)
            self.sampler.redraw(logits, tokens, edited, rows_host, rows, positions_host, positions)
        logprobs = self.sampler.logprobs(logits, tokens, rows_host)
        return self._read_back(tokens, logprobs, failures=self.sampler.take_failures(rows_host))

    def _score_prompt(self, plan: SchedulerOutput, hidden: Tensor, index: int, first: int, count: int) -> list[Tensor]:
        """Log-probabilities of the tokens after `count` positions of a request, a chunk at a time."""
        state, row = self.state.sampling, plan.rows[index]
        begin = sum(plan.num_scheduled_tokens[:index]) + first - plan.num_computed_tokens[index]
        size = max(1, CHUNK[self.device.type] // state.vocab_size)
        parts = []
        for start in range(0, count, size):
            stop = min(start + size, count)
            following = np.array(state.histories[row][first + start + 1 : first + stop + 1], dtype=np.int64)
            logits = self.model.compute_logits(hidden[begin + start : begin + stop])
            top = top_logprobs(logits, upload(following, self.device), int(state.num_prompt_logprobs[row]))
            parts.append(self._to_host(packed(top)))
        return parts

    def _forward(self, plan: SchedulerOutput, batch: InputBatch) -> tuple[Tensor, Tensor]:
        """Any mixture of requests: hidden states [num_tokens, hidden_size], seq_lens [num_reqs]."""
        seq_lens = _seq_lens(plan).tolist()
        num_blocks = -(-max(seq_lens) // self.block_size)
        inputs = self._prepare(batch.rows, batch.query_start_loc, batch.token_ids, num_blocks)
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
            cascade=self._cascade(plan),
        )
        rope_lens = self._rope_lens(plan, batch) if self._needs_rope_lens else None
        return self._run_model(inputs, meta, rope_lens), inputs.seq_lens

    def _cascade(self, plan: SchedulerOutput) -> CascadeInputs | None:
        if self._cascade_items is None or not plan.shared_prefixes:
            return None
        words = self._cascade_items.words(plan.shared_prefixes, plan.num_decodes)
        return cascade_inputs(upload(words, self.device), plan.num_decodes)

    def _decode(self, inputs: DecodeInputs, cascade: CascadeInputs | None = None) -> tuple[Tensor, Tensor]:
        """A whole decode step on the device, to be captured."""
        size, max_blocks = inputs.rows.shape[0], self.state.max_blocks
        starts = self._starts[: size + 1]
        step = self._prepare(inputs.rows, starts, inputs.token_ids, max_blocks, inputs.new_blocks)
        hidden = self._forward_captured(step, starts, [1] * size, size, cascade)
        return self._sample_captured(hidden, inputs.rows, step.seq_lens)

    def _decode_cascade(self, inputs: tuple[DecodeInputs, CascadeInputs]) -> tuple[Tensor, Tensor]:
        return self._decode(*inputs)

    def _run_prompts(self, inputs: PromptInputs) -> tuple[Tensor, Tensor]:
        """A whole step with prompts, to be captured; new rows and blocks are in place."""
        step = self._prepare(inputs.rows, inputs.query_start_loc, inputs.token_ids, self.state.max_blocks)
        lens = [inputs.token_ids.shape[0]] + [0] * (inputs.rows.shape[0] - 1)  # their sum is all that counts
        hidden = self._forward_captured(step, inputs.query_start_loc, lens, num_decodes=0, cascade=None)
        hidden = take_rows(hidden, inputs.sampled_from)
        return self._sample_captured(hidden, inputs.sampled_rows, inputs.sampled_positions)

    def _forward_captured(
        self,
        inputs: StepInputs,
        query_start_loc: Tensor,
        query_lens: list[int],
        num_decodes: int,
        cascade: CascadeInputs | None,
    ) -> Tensor:
        """Hidden states [num_tokens, hidden_size], without the host: every size comes from shapes."""
        max_len = self.state.max_blocks * self.block_size
        meta = AttentionMetadata(
            query_start_loc=query_start_loc,
            seq_lens=inputs.seq_lens,
            block_table=inputs.block_table,
            slot_mapping=inputs.slot_mapping,
            num_decodes=num_decodes,
            num_reqs=len(query_lens),
            max_query_len=max(query_lens),
            max_seq_len=max_len,
            query_lens_host=query_lens,
            seq_lens_host=[max_len] * len(query_lens),
            cascade=cascade,
        )
        return self._run_model(inputs, meta, None)

    def _sample_captured(self, hidden: Tensor, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model.compute_logits(hidden)
        return self.sampler.sample_captured(logits, rows, positions), logits

    def _prepare(
        self,
        rows: Tensor,
        query_start_loc: Tensor,
        token_ids: Tensor,
        num_blocks: int,
        new_blocks: Tensor | None = None,
    ) -> StepInputs:
        state = self.state
        return prepare_inputs(
            rows,
            query_start_loc,
            token_ids,
            state.sampling.last_token,
            state.num_computed,
            state.block_tables,
            self.block_size,
            num_blocks,
            new_blocks,
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
        prompts = self.state.rope_len[batch.rows_host]
        lens = [
            np.maximum(prompt, np.arange(start + 1, start + count + 1))
            for prompt, start, count in zip(prompts, plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True)
        ]
        return torch.from_numpy(np.concatenate(lens)).to(self.device)

    def _read_back(
        self,
        tokens: Tensor,
        logprobs: Sequence[tuple[np.ndarray, Tensor]] = (),
        prompt_logprobs: Sequence[Sequence[Tensor]] = (),
        captured: Captured = (),
        failures: dict[int, str] | None = None,
    ) -> PendingTokens:
        """tokens and logprobs are on the device, everything else is on its way to the host already."""
        host = self._to_host(tokens)
        logprobs = [(members, self._to_host(top)) for members, top in logprobs]
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        return PendingTokens(host, event, logprobs, prompt_logprobs, captured, failures or {})

    def _to_host(self, tensor: Tensor) -> Tensor:
        """A copy that the host does not wait for; the tensor itself on a CPU."""
        if self.device.type != "cuda":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)
