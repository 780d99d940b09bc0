"""DraftingRunner: a second, smaller model beside the one that is served, for steps that draft.

Owns its weights, its KV cache and its chain of steps: one over the tokens that it has not seen, then one for each token
drafted, which stays on the device until all are drawn. Its rows are the target's, and so are their block tables: a
block has the same number in both caches. Invariant: the target's tokens, cache and rows are never written by it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from nanovllm.attention.backend import AttentionBackend
from nanovllm.cache_specs import group_layers
from nanovllm.config import ModelConfig, ResolvedConfig
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.engine.interfaces import PendingStep
from nanovllm.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput
from nanovllm.kernels.cache_codes import cache_dtype
from nanovllm.models.registry import read_model_config
from nanovllm.runner.kv_cache import KVCacheSpec
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.weights.checkpoint import Checkpoint, open_checkpoint


def open_draft(config: ResolvedConfig, target: ModelConfig) -> tuple[Checkpoint, ModelConfig]:
    """The draft model's checkpoint and config. Raises ValueError or NotImplementedError if it cannot draft for it."""
    speculative = config.speculative_config
    assert speculative is not None and speculative.model is not None
    name = f"speculative_config.model={speculative.model!r}"
    checkpoint = open_checkpoint(speculative.model, load_format=config.load_format, revision=speculative.revision)
    draft = read_model_config(checkpoint.config, target.dtype)
    if draft.vocab_size != target.vocab_size:
        raise ValueError(
            f"{name} has {draft.vocab_size} tokens and the model {target.vocab_size}; take one with the same tokenizer"
        )
    if draft.max_model_len < config.max_model_len:
        raise ValueError(
            f"{name} has {draft.max_model_len} positions, fewer than max_model_len={config.max_model_len}; lower that"
        )
    kinds = (draft, target)
    if any(not group_layers(kind.windows, config.max_model_len).keep_everything for kind in kinds):
        raise NotImplementedError(f"{name}: layers with a sliding window cannot draft, nor be drafted for, yet")
    if any(kind.length_dependent_from is not None or kind.long_from is not None for kind in kinds):
        raise NotImplementedError(f"{name}: rotation that depends on the context's length cannot draft yet")
    if draft.state_memory(config) is not None:
        raise NotImplementedError(f"{name}: a model whose layers keep a state cannot draft yet")
    return checkpoint, draft


@dataclass(frozen=True)
class PendingDrafts:
    """Tokens of the chain's steps on their way, each for the same requests; the first step may have others beside."""

    parts: list[PendingStep]

    def result(self) -> ModelRunnerOutput:
        steps = [part.result().token_ids for part in self.parts]
        return ModelRunnerOutput(token_ids=[[ids[0] for ids in of_request] for of_request in zip(*steps, strict=True)])


class DraftModel:
    """The model, before there is a cache. load: (its config, the checkpoint) -> the model with weights."""

    def __init__(
        self,
        config: ResolvedConfig,
        target: ModelConfig,
        device: torch.device,
        tp: TensorParallel,
        load: Callable[[ModelConfig, Checkpoint], Any],
    ) -> None:
        checkpoint, self.model_config = open_draft(config, target)
        assert config.speculative_config is not None
        # The whole chain is queued before the host waits for it.
        depth = 1 + config.speculative_config.num_speculative_tokens
        self.config = replace(config, overlap_depth=depth, logits_processors=())
        self.model = load(self.model_config, checkpoint)
        self._device, self._tp = device, tp
        self._spec = KVCacheSpec(
            groups=group_layers(self.model_config.windows, config.max_model_len),
            num_kv_heads=len(tp.kv_heads(self.model_config.num_kv_heads)),
            head_dim=self.model_config.head_dim,
            block_size=config.block_size,
            dtype=cache_dtype(config.kv_cache_dtype, self.model_config.dtype),
        )

    @property
    def bytes_per_block(self) -> int:
        return self._spec.bytes_per_block

    def runner(self, target: ModelRunner, backend: AttentionBackend) -> ModelRunner:
        """With a cache of as many blocks as the target's, and the target's block tables."""
        caches = self._spec.allocate(target.num_blocks, self._device)
        runner = ModelRunner(self.config, self.model_config, self.model, caches, backend, self._device, self._tp)
        runner.state.block_tables = target.state.block_tables
        runner._first_tables = target._first_tables
        return runner


class DraftingRunner:
    """target, draft: with or without CUDA graphs."""

    def __init__(self, target: Any, draft: Any) -> None:
        self._target, self._draft = target, draft
        self.model, self.device, self.num_blocks = target.model, target.device, target.num_blocks

    def execute(self, plan: SchedulerOutput) -> PendingStep:
        """Queue one step, or a whole chain of the draft model's."""
        if not plan.num_draft_steps:
            return self._target.execute(plan)  # type: ignore[no-any-return]
        parts: list[PendingStep] = [self._draft.execute(plan)]
        drafting = np.flatnonzero(plan.num_samples).tolist()
        more = range(plan.num_draft_steps - 1 if drafting else 0)
        parts.extend(self._draft.execute(_next_token(plan, drafting, index)) for index in more)
        return PendingDrafts(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def _next_token(plan: SchedulerOutput, drafting: list[int], index: int) -> SchedulerOutput:
    """One token more for each of these of the plan's requests, behind `index` of them."""
    num = len(drafting)
    return SchedulerOutput(
        new_rows=[],
        new_blocks=[],
        num_decodes=num,
        rows=[plan.rows[i] for i in drafting],
        num_scheduled_tokens=[1] * num,
        num_computed_tokens=[plan.num_computed_tokens[i] + plan.num_scheduled_tokens[i] + index for i in drafting],
        num_samples=[1] * num,
        token_ids=[-1] * num,
    )
