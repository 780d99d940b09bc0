"""AdapterRunner: steps of requests some of which have an adapter.

Owns which slot each row of the device state reads. Invariant: a step of rows without adapters runs as a ModelRunner
runs it, kernel by kernel; so does any step for the layers that no adapter has.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.config import ResolvedConfig
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.engine.scheduler_output import SchedulerOutput
from nanovllm.kernels.attention_types import AttentionMetadata
from nanovllm.kernels.lora import adapter_rows
from nanovllm.kernels.prepare_inputs import StepInputs
from nanovllm.lora.adapter_store import AdapterStore
from nanovllm.runner.model_runner import ModelRunner, PendingTokens


class Adapters:
    """What an engine with adapters has in the place of other runners, over one AdapterStore, made here."""

    def __init__(self, config: ResolvedConfig, model: Any, device: torch.device, tp: TensorParallel) -> None:
        with device:
            self.store = AdapterStore(model, config.max_loras, config.max_lora_rank, tp, config.deterministic)
        if device.type == "cuda":
            from nanovllm.kernels.triton.linear.skinny_gemm import new_semaphores

            self.store.step.semaphores = new_semaphores(device)

    def runner(self, *given: Any) -> ModelRunner:
        return AdapterRunner(*given, store=self.store)

    def graph_runner(self, runner: Any, *given: Any) -> Any:
        from nanovllm.runner.graphs.adapter_graphs import AdapterGraphRunner

        return AdapterGraphRunner(runner, *given)


class AdapterRunner(ModelRunner):
    def __init__(self, *args: Any, store: AdapterStore, **options: Any) -> None:
        super().__init__(*args, **options)
        self.store = store
        # The last is of padding, row -1.
        self._slots_host = np.full(self.state.num_computed.shape[0] + 1, store.num_slots, dtype=np.int32)
        self._slots = torch.from_numpy(self._slots_host.copy()).to(self.device)
        self._has_any = False
        self._is_adapted = False  # does the step that runs, or is captured, have adapters?

    def enter(self, plan: SchedulerOutput) -> None:
        super().enter(plan)
        is_changed = False
        for new in plan.new_rows:
            slot = self.store.num_slots
            if new.adapter is not None:
                slot, key = new.adapter
                self.store.hold(slot, key)
            is_changed |= self._slots_host[new.row] != slot
            self._slots_host[new.row] = slot
        if is_changed:
            self._slots.copy_(torch.from_numpy(self._slots_host.copy()), non_blocking=True)
            self._has_any = bool((self._slots_host < self.store.num_slots).any())

    def has_adapters(self, plan: SchedulerOutput) -> bool:
        return self._has_any and bool((self._slots_host[plan.rows] < self.store.num_slots).any())

    @contextmanager
    def adapted(self, is_adapted: bool) -> Iterator[None]:
        """What runs inside, or is captured, has adapters, or has none."""
        self._is_adapted = is_adapted
        try:
            yield
        finally:
            self._is_adapted, self.store.step.tokens = False, None

    def run(self, plan: SchedulerOutput) -> PendingTokens:
        with self.adapted(self.has_adapters(plan)):
            return super().run(plan)

    def run_model(
        self, rows: Tensor, inputs: StepInputs, meta: AttentionMetadata, rope_lens: Tensor | None = None
    ) -> Tensor:
        if self._is_adapted:
            of_tokens = rows
            if meta.max_query_len > 1:
                tokens = torch.arange(inputs.input_ids.shape[0], dtype=torch.int32, device=self.device)
                of_tokens = rows[torch.searchsorted(meta.query_start_loc[1:], tokens, right=True)]
            self._take(of_tokens)
        return super().run_model(rows, inputs, meta, rope_lens)

    def compute_logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        if self._is_adapted and self.store.has_head:
            self._take(rows)
        return super().compute_logits(hidden, rows)

    def _take(self, rows: Tensor) -> None:
        """What runs next has these rows."""
        step = self.store.step
        step.tokens = adapter_rows(self._slots[rows], self.store.num_slots, self.store.is_fixed, step.semaphores)
