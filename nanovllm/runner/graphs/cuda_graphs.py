"""StepGraphs: a step captured as a CUDA graph once per size, and replayed as one launch, whatever requests are in it.

Owns capture, replay and the upload of a graph's inputs; which steps there are, and how a plan is laid out for them, is
`layouts.py`'s. Invariant: a graph reads only device memory that outlives it (weights, KV cache, batch state, its static
inputs), so one capture serves every later step of its size. A graph's outputs, tokens and logits, stay valid until the
next graph of the same pool is queued. Eager work queued in between may read and change them: the allocator gives no
memory of a pool to tensors outside of captures as long as a graph uses that pool.
"""

import logging
from collections.abc import Callable
from time import perf_counter
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.scheduler_output import SchedulerOutput

_log = logging.getLogger("nanovllm.late")
Size = TypeVar("Size", contravariant=True)  # hashable
Inputs = TypeVar("Inputs", covariant=True)


class Layout(Protocol[Size, Inputs]):
    """How the inputs of one kind of step lie in one int32 tensor, `words(size)` long."""

    def words(self, size: Size) -> int: ...

    def inputs(self, static: Tensor, size: Size) -> Inputs:
        """Views into the tensor."""
        ...

    def fill(self, words: np.ndarray, size: Size, plan: SchedulerOutput | None) -> None:
        """Write the inputs of `plan`, or of a step without requests."""
        ...


class Memory:
    """Where a tensor on a GPU lies, as `torch.as_tensor` understands it; does not keep the tensor alive.

    The CUDA array interface, version 3 (numba.readthedocs.io), with integers of the right size for any type: NumPy has
    no name for bfloat16.
    """

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.__cuda_array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "strides": tuple(size * stride for stride in tensor.stride()),
            "typestr": f"<i{size}",
        }


class GraphPool:
    """A memory pool that graphs share. PyTorch frees a pool with its last graph, so one small graph keeps it alive."""

    def __init__(self, device: torch.device) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self._staying = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._staying, pool=self.handle, capture_error_mode="relaxed"):
            torch.zeros(1, device=device)


def padding(layout: Layout[Size, Inputs], size: Size, device: torch.device) -> Inputs:
    """The inputs of a step without requests, in memory of their own."""
    words = np.empty(layout.words(size), dtype=np.int32)
    layout.fill(words, size, None)
    return layout.inputs(torch.from_numpy(words).to(device), size)


def compile_kernels(step: Callable[[], object], device: torch.device, is_behind: bool = False) -> None:
    """Compile what a step that could be captured launches. Nothing of it runs. is_behind: wait for nothing."""
    from nanovllm.kernels.triton.common.warmup import compile_behind, compile_together, missing_kernels

    with missing_kernels() as missing, torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="relaxed"):
        step()
    (compile_behind if is_behind else compile_together)(missing, device)


class StepGraphs(Generic[Size, Inputs]):
    """One kind of step: `step(inputs)` runs it eagerly and returns its tokens and logits.

    A graph that owned its logits would keep them from the other sizes' graphs, so the pool would grow by one
    [size, vocab_size] for each. Only a view of where they lie is kept, and all sizes have the same memory for them.

    largest: the size that takes the most memory, captured at once if `pool` is new, so that all others fit into it.
    runs_first: a step must run before it can be captured, kernel by kernel as they are compiled.
    """

    def __init__(
        self,
        step: Callable[[Inputs], tuple[Tensor, Tensor]],
        layout: Layout[Size, Inputs],
        largest: Size,
        num_buffers: int,
        device: torch.device,
        pool: GraphPool,
        runs_first: bool = False,
    ) -> None:
        self._step = step
        self._layout = layout
        words = layout.words(largest)
        self._static = torch.empty(words, dtype=torch.int32, device=device)
        is_pinned = device.type == "cuda"
        self._staging = [torch.empty(words, dtype=torch.int32, pin_memory=is_pinned) for _ in range(num_buffers)]
        self._next = 0
        self._uploaded = np.empty(0, dtype=np.int32)  # what is in `_static`, from its beginning
        self._pool = pool
        self._runs_first = runs_first
        self._graphs: dict[Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def run(self, size: Size, plan: SchedulerOutput) -> tuple[Tensor, Tensor]:
        """Queue one step. Returns its tokens and logits, padding's behind the others; see above for how long."""
        if size not in self._graphs:
            began = perf_counter()
            self.capture(size)
            _log.info("steps of %s: captured late, in %.2f s", size, perf_counter() - began)
        self._upload(size, plan)
        graph, tokens, logits = self._graphs[size]
        graph.replay()
        return tokens, logits

    def capture(self, size: Size, *, compiles: bool = True) -> bool:
        """Nothing runs while a graph is captured. So where kernels are missing, as all are at first, an attempt tells
        which, and they are compiled together. With compiles False nothing is captured then, and False is returned.
        """
        from nanovllm.kernels.triton.common.warmup import compile_together, missing_kernels

        inputs = self._layout.inputs(self._upload(size, None), size)  # capturing must not advance any request
        with missing_kernels() as missing:
            captured = None if self._runs_first else self._captured(inputs)
        if captured is None or missing:
            if not compiles:
                return False
            captured = None  # its memory is for the next attempt
            compile_together(missing, self._static.device)
            self._step(inputs)
            torch.cuda.synchronize()
            captured = self._captured(inputs)
        self._graphs[size] = captured
        return True

    def _captured(self, inputs: Inputs) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:  # type: ignore[misc]
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on, one that waits for a step in flight and NCCL's watchdog; and this one loads kernels.
        with torch.cuda.graph(graph, pool=self._pool.handle, capture_error_mode="relaxed"):
            tokens, logits = self._step(inputs)  # held to the end, so that nothing else in the graph overwrites them
        view = torch.as_tensor(Memory(logits), device=logits.device).view(logits.dtype)
        return graph, tokens, view

    def _upload(self, size: Size, plan: SchedulerOutput | None) -> Tensor:
        """Most steps of a decode are told what the one before was told: these need no copy."""
        words = self._layout.words(size)
        static, staging = self._static[:words], self._staging[self._next][:words]
        self._layout.fill(staging.numpy(), size, plan)
        if not np.array_equal(staging.numpy(), self._uploaded):
            static.copy_(staging, non_blocking=True)
            self._uploaded = staging.numpy().copy()
            self._next = (self._next + 1) % len(self._staging)
        return static
