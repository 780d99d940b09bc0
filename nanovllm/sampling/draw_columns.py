"""DrawColumns: sampling parameters of each running request, one row each, where a CUDA graph can read them.

Owns the columns, on the host (which filters does this step need?) and on the device (with which values?), and what a
draw leaves for the next step: each row's last token. Does not own the rows: the scheduler hands them out. Invariant:
after `upload`, the device has what the last `set_row` of each row wrote; `columns` and `last_token` stay where they
are, so that a CUDA graph may use them.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.sampling.rows import upload
from nanovllm.sampling_params import SamplingParams

ROW = np.dtype(  # 4-byte columns after an 8-byte one, so that one int32 matrix holds them all
    [
        ("seed", np.int64),
        ("temperature", np.float32),  # 0: greedy
        ("min_p", np.float32),  # 0: off
        ("top_p", np.float32),  # 1: off
        ("top_k", np.int32),  # 0: off
        ("repetition_penalty", np.float32),  # 1: off
        ("frequency_penalty", np.float32),  # 0: off
        ("presence_penalty", np.float32),  # 0: off
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
    repetition_penalty: Tensor
    frequency_penalty: Tensor
    presence_penalty: Tensor


class DrawColumns:
    """Rows 0 .. max_num_seqs - 1; `host` is the NumPy mirror (dtype `ROW`).

    columns [max_num_seqs, C] int32: on the device, the rows of `host` as 4-byte words.
    last_token [max_num_seqs] int32: on the device, what the sampler drew last for each row.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.host = np.zeros(max_num_seqs, dtype=ROW)
        self.columns = torch.zeros(max_num_seqs, ROW.itemsize // 4, dtype=torch.int32, device=self.device)
        self.last_token = torch.zeros(max_num_seqs, dtype=torch.int32, device=self.device)
        self._is_stale = False

    def set_row(self, row: int, params: SamplingParams, seed: int) -> None:
        """Put a request into `row`. seed: any integer, taken modulo 2**64.

        Filters that would keep every token are stored as off, so they cost nothing.
        """
        entry = self.host[row]
        entry["seed"] = np.uint64(seed % 2**64).astype(np.int64)
        entry["temperature"] = 0.0 if params.is_greedy else params.temperature
        entry["min_p"] = params.min_p
        entry["top_p"] = params.top_p
        entry["top_k"] = params.top_k if 0 < params.top_k < self.vocab_size else 0
        for name in ("repetition_penalty", "frequency_penalty", "presence_penalty"):
            entry[name] = getattr(params, name)
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
        temperature, min_p, top_p, _, repetition, frequency, presence, _ = rest.view(torch.float32).unbind(1)
        return RowParams(
            seed.view(torch.int64)[:, 0], temperature, min_p, top_p, rest[:, 3], repetition, frequency, presence
        )
