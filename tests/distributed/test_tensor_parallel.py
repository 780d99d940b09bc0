"""What a sum over ranks is handed to."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nanovllm.distributed.shared_memory import can_share_memory
from nanovllm.distributed.tensor_parallel import TensorParallel


class OfOneRow:
    def takes(self, x: Tensor) -> bool:
        return x.shape[0] == 1

    def __call__(self, x: Tensor) -> Tensor:
        return x + 1


def test_few_rows_take_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda x, group: sums.append(x))
    tp = TensorParallel(0, 2, sum_few=OfOneRow())
    one, two = torch.zeros(1, 4), torch.zeros(2, 4)
    assert torch.equal(tp.all_reduce(one), torch.ones(1, 4)) and not sums
    assert tp.all_reduce(two) is two and sums == [two]


def test_one_rank_sums_nothing() -> None:
    x = torch.zeros(1, 4)
    assert TensorParallel().all_reduce(x) is x


def test_cpus_share_no_device_memory() -> None:
    assert not can_share_memory(0, 2, torch.device("cpu"))


@pytest.mark.gpu
def test_more_ranks_than_devices_share_no_memory() -> None:
    assert not can_share_memory(0, torch.cuda.device_count() + 1, torch.device("cuda", 0))
