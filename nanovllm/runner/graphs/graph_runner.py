"""GraphRunner: steps replayed from CUDA graphs where there is one, and left to a ModelRunner where there is none.

Owns the choice, the graphs, and what is queued behind a replay for rows that ask for more than a graph does. Invariant:
tokens are those of the ModelRunner alone, whose model, cache and rows the graphs use.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.config import ResolvedConfig
from nanovllm.engine.scheduler_output import SchedulerOutput
from nanovllm.kernels.cascade import CascadeInputs
from nanovllm.kernels.draft_places import Places
from nanovllm.kernels.triton.common.launch import dependent_launch
from nanovllm.model_config import ModelConfig
from nanovllm.runner.extras import NO_EXTRAS
from nanovllm.runner.graphs.captured_steps import CapturedSteps, runs_before_capture, warm_up_behind
from nanovllm.runner.graphs.cuda_graphs import GraphPool, Inputs, Layout, Size, StepGraphs
from nanovllm.runner.graphs.layouts import (
    CascadeLayout,
    DecodeInputs,
    DecodeLayout,
    PromptInputs,
    PromptLayout,
    PromptSize,
)
from nanovllm.runner.graphs.step_parts import PendingParts, StepParts, split
from nanovllm.runner.graphs.verify_steps import VerifyLayout, VerifySteps
from nanovllm.runner.model_runner import ModelRunner, PendingTokens, seq_lens_of
from nanovllm.sampling.edited_rows import redraw_edited
from nanovllm.sampling.rows import SampledRows, upload

# Of the layers' weights: an H200 reads as many in 2 ms, and a host takes 14 to launch 28 layers kernel by kernel.
LIGHT_BYTES = 8 * 2**30


class Graphs(NamedTuple):
    """One for each kind of step in `layouts.py`; cascade: None where shared prefixes are never read at once."""

    decode: StepGraphs[int, DecodeInputs]
    prompts: StepGraphs[PromptSize, PromptInputs]
    verify: StepGraphs[int, Places]
    cascade: StepGraphs[int, tuple[DecodeInputs, CascadeInputs]] | None


class GraphRunner:
    def __init__(
        self, runner: ModelRunner, config: ResolvedConfig, model_config: ModelConfig, splits_prompts: bool = True
    ) -> None:
        """Captures the largest decode step, and prompts of some lengths; other steps are captured when they first come.

        splits_prompts: a step may run as two (`step_parts.py`).
        """
        self._runner = runner
        self.model, self.device, self.num_blocks = runner.model, runner.device, runner.num_blocks
        self._dependent_launch = config.dependent_launch
        self._captures_prompts = can_capture_prompts(model_config)
        # Of the layers alone: their share is the same on every rank, and all ranks must decide alike.
        weight_bytes = sum(weight.numel() * weight.element_size() for weight in runner.model.layers.parameters())
        self._splits_prompts = splits_prompts and self._captures_prompts and weight_bytes <= LIGHT_BYTES
        self._decodes = DecodeLayout(config.max_num_seqs)
        self._prompts = PromptLayout()
        self._verifies, self._verify = VerifyLayout(), VerifySteps(runner)
        self._how = config.overlap_depth + 1, runner.device, GraphPool(runner.device), runs_before_capture(config)
        self._max_num_seqs = config.max_num_seqs
        self._graphs = self._make_graphs()
        with dependent_launch(self._dependent_launch):
            self._graphs.decode.capture(config.max_num_seqs)  # the largest first: the others fit into its memory
            for size in self._prompts.at_once(config.max_num_batched_tokens) if self._captures_prompts else ():
                if not self._graphs.prompts.capture(size, compiles=False):
                    break
        if runner.device.type == "cuda":
            from nanovllm.kernels.triton.common.warmup import log_late_kernels

            warm_up_behind(runner, config, self._captures_prompts)
            torch.cuda.empty_cache()  # what the dry run took
            log_late_kernels()

    def _make_graphs(self) -> "Graphs":
        """None of them captured."""
        steps, most = CapturedSteps(self._runner, self._max_num_seqs), self._max_num_seqs
        cascade = None
        if self._runner.cascade_items is not None:
            cascades = CascadeLayout(self._decodes, self._runner.cascade_items)
            cascade = self.graphs_of(steps.decode_cascade, cascades, most)
        return Graphs(
            self.graphs_of(steps.decode, self._decodes, most),
            self.graphs_of(steps.prompts, self._prompts, self._prompts.largest),
            self.graphs_of(self._verify.step, self._verifies, self._verifies.sizes[-1]),
            cascade,
        )

    def graphs_of(
        self, step: Callable[[Inputs], tuple[Tensor, Tensor]], layout: Layout[Size, Inputs], largest: Size
    ) -> StepGraphs[Size, Inputs]:
        """Of one more kind of step, in the memory of all of them."""
        return StepGraphs(step, layout, largest, *self._how)

    @torch.inference_mode()
    def execute(self, plan: SchedulerOutput) -> PendingTokens | PendingParts:
        """Queue one step."""
        with dependent_launch(self._dependent_launch):
            self._runner.enter(plan)
            parts = self._parts(plan)
            if parts is None:
                return self._run(plan)
            return PendingParts(self._run(parts.decodes), self._run(parts.others), parts.is_decode)

    def _parts(self, plan: SchedulerOutput) -> StepParts | None:
        """Two parts, if the decodes can have their CUDA graph by themselves and not with what runs beside them.

        That is requests that capture hidden states; or prompts, which are captured, but not beside so many requests or
        such long ones. There, reading the weights twice takes less time than launching every kernel, if they are few.
        """
        num_prompt_tokens = len(plan.token_ids) - plan.num_decodes
        if plan.num_draft_tokens:
            return None
        if plan.capture_layers:
            parts = split(plan, [row not in plan.capture_layers for row in plan.rows])
        elif (
            self._splits_prompts
            and plan.num_decodes
            and 0 < num_prompt_tokens <= self._prompts.num_tokens[-1]
            and self._prompts.size(plan) is None
        ):
            new_rows = {new.row for new in plan.new_rows}
            parts = split(plan, [i < plan.num_decodes and row not in new_rows for i, row in enumerate(plan.rows)])
            if parts.others.prompt_logprobs or self._prompts.size(parts.others) is None:
                return None
        else:
            return None
        is_captured = bool(parts.decodes.rows) and self._decodes.size(parts.decodes) is not None
        return parts if is_captured and not parts.decodes.prompt_logprobs else None

    def _run(self, plan: SchedulerOutput) -> PendingTokens:
        if plan.prompt_logprobs or plan.capture_layers:  # these need hidden states, and a graph leaves none
            return self._runner.run(plan)
        self._runner.sampler.columns.upload()
        if plan.num_draft_tokens:
            if (num_places := self._verifies.size(plan)) is not None:
                return self._verify.run(self._graphs.verify, num_places, plan)
            return self._runner.run(plan)
        if (size := self._decodes.size(plan)) is not None:
            if self._runner.layer_groups is not None and plan.new_blocks:  # a graph takes those of one table
                self._runner.stage(plan)
                plan = replace(plan, new_blocks=[])
            if plan.shared_prefixes and self._graphs.cascade is not None:
                return self._finish(plan, *self._graphs.cascade.run(size, plan))
            return self._finish(plan, *self._graphs.decode.run(size, plan))
        if self._captures_prompts and (prompt_size := self._prompts.size(plan)) is not None:
            self._runner.stage(plan)
            return self._finish(plan, *self._graphs.prompts.run(prompt_size, plan))
        return self._runner.run(plan)

    def _finish(self, plan: SchedulerOutput, tokens: Tensor, logits: Tensor) -> PendingTokens:
        """Queue what a graph cannot do for some rows, edits of logits and log-probabilities, behind its replay.

        tokens, logits: as the graph left them, padding's behind the others.
        """
        runner = self._runner
        num_sampled = sum(plan.num_samples)
        tokens, logits = tokens[:num_sampled], logits[:num_sampled]
        if runner.sampler.is_plain(plan.rows):
            return runner.read_back(tokens)
        sampled = np.flatnonzero(plan.num_samples)
        rows_host, positions_host = np.array(plan.rows)[sampled], seq_lens_of(plan)[sampled]
        uploaded = upload(np.stack((rows_host, positions_host)).astype(np.int32), runner.device)
        rows = SampledRows(rows_host, uploaded[0], positions_host, uploaded[1])
        redraw_edited(runner.sampler, logits, tokens, rows)
        return runner.read_back(tokens, NO_EXTRAS.of_sampled(runner, logits, tokens, rows))


def can_capture_prompts(model_config: ModelConfig) -> bool:
    """Where rotation depends on the context, what a prompt's tokens are told does not fit into a captured step."""
    return model_config.length_dependent_from is None and model_config.long_from is None
