"""SampledRows: whose tokens a step samples, for the host and for the device.

Owns the four arrays that every stage reads. Invariant: they run in parallel; no row comes twice.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class SampledRows:
    """rows [n]: the requests' rows. positions [n]: where the new tokens will stand. Both int32 on the device."""

    rows_host: np.ndarray
    rows: Tensor
    positions_host: np.ndarray
    positions: Tensor

    def __len__(self) -> int:
        return len(self.rows_host)

    def select(self, members: np.ndarray) -> "SampledRows":
        """Those of the n that `members` [m] int64 names."""
        index = upload(members, self.rows.device)
        return SampledRows(
            self.rows_host[members], self.rows[index], self.positions_host[members], self.positions[index]
        )


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for: torch's pool keeps the pinned source until it has run."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
