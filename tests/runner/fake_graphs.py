"""Captured steps without a GPU: what would be captured runs each time instead, on a CPU.

A graph's logits hold until the next one is queued; here they are NaN from then on.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend
from nanovllm.engine.scheduler_output import SchedulerOutput
from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.paged_attention import paged_attention_reference
from nanovllm.runner.graphs.cuda_graphs import StepGraphs
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.sampling.rows import SampledRows
from nanovllm.sampling.sampler import Sampler


class FakeGraphs:
    """How steps ran: the sizes of graphs that were replayed, and how many steps were not captured."""

    def __init__(self) -> None:
        self.replayed: list[Any] = []
        self.num_uncaptured = 0
        self.logits: Tensor | None = None  # of the last replay

    @property
    def num_decodes(self) -> int:
        return sum(isinstance(size, int) for size in self.replayed)

    @property
    def num_prompts(self) -> int:
        return len(self.replayed) - self.num_decodes


class RunEagerly(StepGraphs[Any, Any]):
    def __init__(
        self,
        step: Any,
        layout: Any,
        largest: Any,
        num_buffers: int,
        device: torch.device,
        pool: FakeGraphs,
        runs_first: bool,
    ) -> None:
        self._run_step, self._layout, self._fake = step, layout, pool

    def capture(self, size: Any, *, compiles: bool = True) -> bool:
        if compiles:
            self._run(size, None)
        return compiles

    def run(self, size: Any, plan: SchedulerOutput) -> tuple[Tensor, Tensor]:
        if self._fake.logits is not None:
            self._fake.logits.fill_(torch.nan)
        tokens, self._fake.logits = self._run(size, plan)
        self._fake.replayed.append(size)
        return tokens, self._fake.logits

    def _run(self, size: Any, plan: SchedulerOutput | None) -> tuple[Tensor, Tensor]:
        words = np.empty(self._layout.words(size), dtype=np.int32)
        self._layout.fill(words, size, plan)
        tokens, logits = self._run_step(self._layout.inputs(torch.from_numpy(words), size))
        return tokens, logits


class ReferenceBackend(AttentionBackend):
    """Attention that reads lengths from tensors alone, as a captured step must."""

    def prepare(self, meta: AttentionMetadata) -> AttentionMetadata:
        return meta

    def forward(
        self,
        shape: AttentionShape,
        q: Tensor,
        cache: LayerCache,
        prepared: AttentionMetadata,
        sinks: Tensor | None = None,
    ) -> Tensor:
        return paged_attention_reference(q, cache, prepared, shape, sinks)


def sample_on_cpu(sampler: Sampler, logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """As `Sampler.sample_captured`."""
    tokens = torch.zeros(len(rows), dtype=torch.int32)
    real = (rows >= 0).nonzero()[:, 0]
    if len(real):
        drawn = SampledRows(rows[real].numpy(), rows[real], positions[real].numpy(), positions[real])
        tokens[real] = sampler.draw(logits[real], drawn)
    return tokens


def fake_graphs(monkeypatch: pytest.MonkeyPatch, backend: Any = None) -> FakeGraphs:
    """Engines made from now on have graphs. backend: of the attention; if none is given, nothing here needs Triton."""
    fake = FakeGraphs()
    monkeypatch.setattr("nanovllm.executor.worker.choose_backend", lambda *_: backend or ReferenceBackend())
    monkeypatch.setattr("nanovllm.executor.worker.can_capture", lambda _: True)
    monkeypatch.setattr("nanovllm.runner.graphs.graph_runner.StepGraphs", RunEagerly)
    monkeypatch.setattr("nanovllm.runner.graphs.graph_runner.GraphPool", lambda _: fake)
    if backend is None:
        monkeypatch.setattr(Sampler, "sample_captured", sample_on_cpu)
    forward = ModelRunner.forward

    def counted(*arguments: Any) -> Any:
        fake.num_uncaptured += 1
        return forward(*arguments)

    monkeypatch.setattr(ModelRunner, "forward", counted)
    return fake
