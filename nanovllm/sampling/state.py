"""SamplingState: what each running request asks of the sampler, one row a request.

Owns the columns, on the host (which stages does this step need?) and on the device (with which values?). Does not own
the rows: the scheduler hands them out. Invariant: after `upload`, the device has what the last `set_row` of each row
wrote; `columns` stays one tensor at one address, so a CUDA graph may read it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.sampling_params import SamplingParams

ROW = np.dtype(  # 4-byte columns after an 8-byte one, so that one int32 matrix holds them all
    [
        ("seed", np.int64),
        ("temperature", np.float32),  # 0: greedy
        ("min_p", np.float32),  # 0: off
        ("top_p", np.float32),  # 1: off
        ("top_k", np.int32),  # 0: off
        ("min_length", np.int32),  # no stop token at a position below this; 0: off
        ("_pad", np.int32),
    ]
)


class RowParams(NamedTuple):
    """Columns of some rows on the device, each [n]; dtypes as in `ROW`."""

    seed: Tensor
    temperature: Tensor
    min_p: Tensor
    top_p: Tensor
    top_k: Tensor
    min_length: Tensor


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for: torch's pool keeps the pinned source until it has run."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class SamplingState:
    """Rows 0 .. max_num_seqs - 1; `host` is the NumPy mirror (dtype `ROW`), `stop_ids` what `min_tokens` holds back.

    columns [max_num_seqs, C] int32: on the device, the rows of `host` as 4-byte words.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.host = np.zeros(max_num_seqs, dtype=ROW)
        self.stop_ids: list[tuple[int, ...]] = [()] * max_num_seqs
        self.columns = torch.zeros(max_num_seqs, ROW.itemsize // 4, dtype=torch.int32, device=self.device)
        self._is_stale = False

    def set_row(self, row: int, params: SamplingParams, seed: int, prompt_len: int, stop_ids: Sequence[int]) -> None:
        """Put a request into `row`. seed: any integer, taken modulo 2**64; stop_ids: ids that min_tokens holds back.

        Filters that would keep every token are stored as off, so they cost nothing.
        """
        entry = self.host[row]
        entry["seed"] = np.uint64(seed % 2**64).astype(np.int64)
        entry["temperature"] = 0.0 if params.is_greedy else params.temperature
        entry["min_p"] = params.min_p
        entry["top_p"] = params.top_p
        entry["top_k"] = params.top_k if 0 < params.top_k < self.vocab_size else 0
        # An id outside the vocabulary has no logit to hold back: a tokenizer may know more ids than the model.
        known = {stop_id for stop_id in stop_ids if 0 <= stop_id < self.vocab_size}
        self.stop_ids[row] = tuple(sorted(known)) if params.min_tokens else ()
        entry["min_length"] = min(prompt_len + params.min_tokens, 2**31 - 1) if self.stop_ids[row] else 0
        self._is_stale = True

    def upload(self) -> Tensor:
        """Bring `columns` up to date, all new rows in one copy that the host does not wait for, and return it."""
        if self._is_stale:
            packed = self.host.view(np.int32).reshape(len(self.host), -1)
            self.columns.copy_(upload(packed, self.device), non_blocking=True)
            self._is_stale = False
        return self.columns

    def select(self, rows: Tensor) -> RowParams:
        """The columns of `rows` [n] on the device, up to date."""
        seed, rest = self.upload().index_select(0, rows).split((2, ROW.itemsize // 4 - 2), dim=1)
        values = rest.view(torch.float32)
        return RowParams(seed.view(torch.int64)[:, 0], *values.unbind(1)[:3], *rest.unbind(1)[3:5])
