"""DraftingRunner: a second, smaller model beside the one that is served, for steps that draft.

Owns its weights, its KV cache and its chain of steps: one over the tokens that it has not seen, then one for each token
drafted, which stays on the device until all are drawn. Its rows are the target's, and so are their block tables: a
block has the same number in both caches. Invariant: the target's tokens, cache and rows are never written by it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend
from nanovllm.config import NamedModule, ResolvedConfig
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.engine.interfaces import PendingStep
from nanovllm.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput
from nanovllm.layers.experts import Experts
from nanovllm.layers.linear import LinearBase
from nanovllm.layers.ops import choose_ops
from nanovllm.model_config import ModelConfig
from nanovllm.models.dflash import DFlashConfig, DFlashHead, read_dflash_config
from nanovllm.models.draft_heads import HiddenStateStore, SteppedHead
from nanovllm.models.eagle3 import Eagle3Config, Eagle3Head, read_eagle3_config
from nanovllm.models.mtp import MTPConfig, MTPHead, read_mtp_config
from nanovllm.models.registry import read_model_config
from nanovllm.runner.dflash import DFlashRunner
from nanovllm.runner.input_batch import InputStager
from nanovllm.runner.kv_cache import KVCacheSpec, MakeZeros
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.speculative_config import num_unseen
from nanovllm.weights.checkpoint import Checkpoint, SafetensorsCheckpoint, open_checkpoint
from nanovllm.weights.loader import fill_random, load_weights, places

if TYPE_CHECKING:
    from nanovllm.runner.graphs.chained_steps import ChainedSteps
    from nanovllm.runner.graphs.graph_runner import GraphRunner


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
    _check_layers(config, (draft, target), name)
    return checkpoint, draft


HeadConfig = Eagle3Config | DFlashConfig | MTPConfig


def open_head(config: ResolvedConfig, target: ModelConfig, of_target: Checkpoint) -> tuple[Checkpoint, HeadConfig]:
    """The head's checkpoint and config. Raises ValueError or NotImplementedError if it is none for this model."""
    speculative = config.speculative_config
    assert speculative is not None
    if speculative.method == "mtp":
        return of_target, _own_head(config, target, of_target)
    assert speculative.model is not None
    name = f"speculative_config.model={speculative.model!r}"
    checkpoint = open_checkpoint(speculative.model, load_format=config.load_format, revision=speculative.revision)
    if speculative.method == "eagle3":
        eagle3 = read_eagle3_config(checkpoint.config, target, name)
        _check_layers(config, (eagle3.layer, target), name)
        return checkpoint, eagle3
    dflash = read_dflash_config(checkpoint.config, target, name)
    _check_layers(config, (dflash.layers, target), name)
    if speculative.num_speculative_tokens >= dflash.block_size:
        raise ValueError(
            f"{name} guesses at most {dflash.block_size - 1} tokens, and num_speculative_tokens is "
            f"{speculative.num_speculative_tokens}"
        )
    return checkpoint, dflash


def _own_head(config: ResolvedConfig, target: ModelConfig, checkpoint: Checkpoint) -> MTPConfig:
    """That of the model's own checkpoint."""
    name = f"speculative_config.method='mtp': {config.model!r}"
    if isinstance(config.model, NamedModule):
        raise NotImplementedError(f"{name} is a model in this process, whose prediction head is not read")
    if not isinstance(checkpoint, SafetensorsCheckpoint):
        raise NotImplementedError(f"{name} is a GGUF file, whose prediction head is not read")
    head = read_mtp_config(checkpoint.config, target, name)
    if config.load_format != "dummy" and not checkpoint.num_of_prediction_head:
        raise ValueError(f"{name} has no tensors of a prediction head; use another method")
    _check_layers(config, (head.layer, target), name)
    return head


def check_draft(config: ResolvedConfig, target: ModelConfig, of_target: Checkpoint) -> None:
    """Raises as `open_draft` and `open_head` do; no weight is read."""
    assert config.speculative_config is not None
    if config.speculative_config.method == "draft_model":
        open_draft(config, target)
    else:
        open_head(config, target, of_target)


def _check_layers(config: ResolvedConfig, kinds: Sequence[ModelConfig], name: str) -> None:
    if any(not kind.cache_groups(config.max_model_len).keep_everything for kind in kinds):
        raise NotImplementedError(f"{name}: layers with a sliding window cannot draft, nor be drafted for, yet")
    if any(kind.length_dependent_from is not None or kind.long_from is not None for kind in kinds):
        raise NotImplementedError(f"{name}: rotation that depends on the context's length cannot draft yet")
    if kinds[0].state is not None:
        raise NotImplementedError(f"{name}: a model whose layers keep a state cannot draft yet")


@dataclass(frozen=True)
class PendingDrafts:
    """Tokens of the chain's steps on their way, each for the same requests; the first step may have others beside."""

    parts: list[PendingStep]
    offsets: Sequence[int] | None = None  # from the draft model's tokens to the target's, where they differ

    def result(self) -> ModelRunnerOutput:
        steps = [part.result().token_ids for part in self.parts]
        drafts = [[ids[0] for ids in of_request] for of_request in zip(*steps, strict=True)]
        if self.offsets is not None:
            drafts = [[token_id + self.offsets[token_id] for token_id in draft] for draft in drafts]
        return ModelRunnerOutput(token_ids=drafts)


class DraftModel:
    """The model, before there is a cache. in_one_pass: a step draws all that it is asked for, without a chain."""

    head: Any = None
    in_one_pass = False

    def __init__(
        self,
        config: ResolvedConfig,
        target_config: ModelConfig,
        target: Any,
        of_target: Checkpoint,
        device: torch.device,
        tp: TensorParallel,
        load: Callable[[ModelConfig, Checkpoint], Any],
    ) -> None:
        """target, of_target: the model and its checkpoint. load: (config of the draft model, its own checkpoint) -> the
        draft model with its weights.
        """
        checkpoint, self.model_config = open_draft(config, target_config)
        self.config = _config_of_chain(config)
        self.model = load(self.model_config, checkpoint)
        self._device, self._tp = device, tp
        self._spec = _cache_spec(config, self.model_config, tp)

    @property
    def bytes_per_block(self) -> int:
        return self._spec.bytes_per_block

    def runner(self, target: ModelRunner, backend: AttentionBackend, make: MakeZeros) -> ModelRunner:
        """With a cache, which `make` makes, of as many blocks as the target's, and the target's block tables."""
        caches = self._spec.allocate(target.num_blocks, self._device, make)
        runner = ModelRunner(self.config, self.model_config, self.model, caches, backend, self._device, self._tp)
        runner.state.block_tables = target.state.block_tables
        runner._first_tables = target._first_tables
        runner._stager = InputStager(target.state.block_tables.shape[1], self.config.overlap_depth + 1, self._device)
        return runner


class HeadDraft(DraftModel):
    """A head on the target's states in the place of a model. Those of `speculators` are whole on each rank."""

    def __init__(
        self,
        config: ResolvedConfig,
        target_config: ModelConfig,
        target: Any,
        of_target: Checkpoint,
        device: torch.device,
        tp: TensorParallel,
        load: Callable[[ModelConfig, Checkpoint], Any],
    ) -> None:
        assert config.speculative_config is not None
        checkpoint, head_config = open_head(config, target_config, of_target)
        self.in_one_pass = isinstance(head_config, DFlashConfig)
        self._aux_layers, self._head_config = head_config.aux_layers, head_config
        self._device, self._tp, self._target = device, TensorParallel(), target
        self.config = replace(_config_of_chain(config), tensor_parallel_size=1)
        if isinstance(head_config, MTPConfig):  # as large as a layer of the target's
            self.config, self._tp = _config_of_chain(config), tp
        dtype, sizes = getattr(torch, target_config.dtype), (config.max_model_len, config.max_num_seqs)
        with device:
            ops = choose_ops(device, config.compilation, config.deterministic)
            if isinstance(head_config, DFlashConfig):
                self.model_config = head_config.layers
                self.head = DFlashHead(head_config, target, config.max_model_len, dtype, ops)
            elif isinstance(head_config, MTPConfig):
                self.model_config = head_config.layer
                self.head = MTPHead(head_config, target, *sizes, dtype, tp, ops)
            else:
                self.model_config = head_config.layer
                self.head = Eagle3Head(head_config, target.embed_tokens, *sizes, dtype, ops)
            specs = dict(self.head.weights())  # this makes the weights
        self.model = self.head
        if config.load_format == "dummy":
            fill_random(self.head, config.seed)
        else:
            load_weights(self.head, self.head.weights_among(_tensors(checkpoint, head_config, dtype, places(specs))))
        del specs
        self.head.requires_grad_(False).eval()
        for module in self.head.modules():
            if isinstance(module, LinearBase | Experts):
                module.finish()
        self._spec = _cache_spec(config, self.model_config, self._tp)

    @property
    def bytes_per_block(self) -> int:
        states = len(self._aux_layers) * self.model_config.hidden_size * self._spec.dtype.itemsize
        return self._spec.bytes_per_block + self._spec.block_size * states

    def runner(self, target: ModelRunner, backend: AttentionBackend, make: MakeZeros) -> Any:
        num_slots, width = target.num_blocks * target.block_size, len(self._aux_layers) * self.model_config.hidden_size
        states = make((num_slots + 1, width), self._spec.dtype, self._device)
        self.head.store = HiddenStateStore(self._target, self._aux_layers, states)
        if not isinstance(self._head_config, DFlashConfig):
            return super().runner(target, backend, make)
        caches = self._spec.allocate(target.num_blocks, self._device, make)
        return DFlashRunner(self.head, self._head_config.mask_token_id, caches, target, backend)


def _tensors(
    checkpoint: Checkpoint, head: HeadConfig, dtype: torch.dtype, places: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    if isinstance(head, MTPConfig) and isinstance(checkpoint, SafetensorsCheckpoint):
        return checkpoint.prediction_head()
    return checkpoint.tensors(dtype, places)


def _config_of_chain(config: ResolvedConfig) -> ResolvedConfig:
    """The whole chain is queued before the host waits for it."""
    assert config.speculative_config is not None
    depth = 1 + config.speculative_config.num_speculative_tokens
    return replace(config, overlap_depth=depth, logits_processors=())


def _cache_spec(config: ResolvedConfig, model_config: ModelConfig, tp: TensorParallel) -> KVCacheSpec:
    return KVCacheSpec(
        groups=model_config.cache_groups(config.max_model_len),
        num_kv_heads=len(tp.kv_heads(model_config.num_kv_heads)),
        head_dim=model_config.head_dim,
        block_size=config.block_size,
        dtype=getattr(torch, model_config.dtype),
        num_planes=model_config.num_cache_planes,
    )


def chained_steps(
    config: ResolvedConfig, draft: DraftModel, drafter: Any, target: ModelRunner, graphs: "GraphRunner"
) -> "ChainedSteps":
    """Steps of the target's graphs that draft and verify. drafter: the draft's own runner, without graphs."""
    from nanovllm.runner.graphs.chained_steps import ChainedSteps, DraftPasses
    from nanovllm.runner.graphs.draft_passes import SequentialPasses

    assert config.speculative_config is not None
    most, unseen = config.speculative_config.num_speculative_tokens, num_unseen(config.speculative_config)
    passes: DraftPasses = drafter if draft.in_one_pass else SequentialPasses(drafter, draft.head, most, unseen)
    return ChainedSteps(graphs, target, passes, most, unseen, config.dependent_launch)


class DraftingRunner:
    """target, draft: with or without CUDA graphs. of: what the draft's runner runs."""

    def __init__(self, target: Any, draft: Any, of: DraftModel, chain: "ChainedSteps | None" = None) -> None:
        """chain: where drafts and their verification can be one step."""
        self._target, self._draft, self._in_one_pass, self._chain = target, draft, of.in_one_pass, chain
        self._head = of.head if isinstance(of.head, SteppedHead) else None
        self._offsets = None if self._head is None else self._head.offsets.tolist()
        self.model, self.device, self.num_blocks = target.model, target.device, target.num_blocks

    def execute(self, plan: SchedulerOutput) -> PendingStep:
        """Queue one step, or a whole chain of the draft model's."""
        if not plan.num_draft_steps:
            return self._target.execute(plan)  # type: ignore[no-any-return]
        if plan.num_draft_tokens:
            assert self._chain is not None
            return self._chain.execute(plan)
        if self._in_one_pass:
            return self._draft.execute(plan)  # type: ignore[no-any-return]
        if self._head is not None:
            self._head.is_chained = False
        parts: list[PendingStep] = [self._draft.execute(plan)]
        if self._head is not None:
            self._head.is_chained = True
        drafting = np.flatnonzero(plan.num_samples).tolist()
        more = range(plan.num_draft_steps - 1 if drafting else 0)
        parts.extend(self._draft.execute(_next_token(plan, drafting, index)) for index in more)
        return PendingDrafts(parts, self._offsets)

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
