"""Python logits processors: functions of the user's, run on the host for one row at a time.

Owns what happens when one of them fails: its reason is returned, so that its request can end with it, and the other
rows go on. Invariant: tensor-parallel ranks continue with the same logits and the same failures, those of rank 0. It
alone calls the functions: one may count its calls, draw random numbers, or fail in one process and not in another.
"""

import traceback
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.engine.scheduler_output import NewRow
from nanovllm.sampling.rows import SampledRows, upload
from nanovllm.sampling.stages.histories import Histories
from nanovllm.sampling.stages.stage import Stage
from nanovllm.sampling_params import LogitsProcessor

_REASON_BYTES = 1024  # of what other ranks are told


class PythonProcessors(Stage):
    """The engine's functions, then the request's. failures: row -> why one of its functions failed, until taken."""

    def __init__(
        self, max_num_seqs: int, functions: Sequence[LogitsProcessor], histories: Histories, tp: TensorParallel
    ) -> None:
        """functions: the engine's, which run for every row. tp: the ranks that sample the same logits."""
        super().__init__(max_num_seqs)
        self._of_engine = tuple(functions)
        self._functions: dict[int, tuple[LogitsProcessor, ...]] = {}
        self._histories = histories
        self._tp = tp
        self.failures: dict[int, str] = {}

    def read(self, new: NewRow) -> bool:
        functions = self._functions[new.row] = (*self._of_engine, *(new.params.logits_processors or ()))
        return bool(functions)

    def apply(self, logits: Tensor, rows: SampledRows) -> Tensor:
        members = np.flatnonzero(self.asks(rows))
        asking = rows.rows_host[members].tolist()
        index = upload(members, logits.device)
        values = logits[index]
        histories, functions = map(self._histories.of, asking), [self._functions[row] for row in asking]
        failures = run_processors(values, list(histories), functions, self._tp)
        self.failures.update((asking[i], reason) for i, reason in failures.items())
        return logits.index_copy(0, index, values)


def run_processors(
    logits: Tensor,
    histories: Sequence[list[int]],
    processors: Sequence[tuple[LogitsProcessor, ...]],
    tp: TensorParallel,
) -> dict[int, str]:
    """Replace each row of logits [n, V] float32 by what its processors make of it, in turn.

    histories: token ids of prompt and output so far. Returns index of a row -> why it failed; its logits stay.
    """
    failures: dict[int, str] = {}
    if tp.rank == 0:
        for index, (history, functions) in enumerate(zip(histories, processors, strict=True)):
            values = logits[index]
            for function in functions:
                try:
                    values = _checked(function(list(history), values.clone()), logits.shape[1:])
                except Exception as error:
                    failures[index] = _describe(function, error)
                    break
            else:
                logits[index] = values
    if tp.size > 1:
        tp.broadcast(logits)
        failures = _those_of_rank_0(failures, logits, tp)
    return failures


def _checked(result: object, shape: torch.Size) -> Tensor:
    if not isinstance(result, Tensor):
        raise TypeError(f"it must return a tensor, got {type(result).__name__}")
    if not result.is_floating_point():
        raise TypeError(f"it must return floating-point numbers, got {result.dtype}")
    if result.shape != shape:
        raise ValueError(f"it must return a tensor of shape {tuple(shape)}, got {tuple(result.shape)}")
    return result


def _describe(function: LogitsProcessor, error: Exception) -> str:
    """The function, the error, and the line that raised it unless that is ours."""
    name = getattr(function, "__qualname__", None) or repr(function)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if frame.filename == __file__ else f" ({frame.filename}, line {frame.lineno})"
    return f"logits processor {name} failed: {type(error).__name__}: {error}{where}"


def _those_of_rank_0(failures: dict[int, str], logits: Tensor, tp: TensorParallel) -> dict[int, str]:
    """Reasons travel as UTF-8 padded with zeros; a row that has not failed has none."""
    reasons = torch.zeros(len(logits), _REASON_BYTES, dtype=torch.uint8)
    for index, reason in failures.items():
        data = reason.encode()[:_REASON_BYTES]
        reasons[index, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    reasons = tp.broadcast(reasons.to(logits.device)).cpu()
    texts = (bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in reasons)
    return {index: text for index, text in enumerate(texts) if text}
