"""Which sums a rank does by itself: all or none of the ranks share memory."""

import pytest
import torch

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.executor import worker


def test_ranks_that_cannot_map_memory_leave_sums_to_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def share_memory(*_: object) -> None:
        raise RuntimeError("no peer access")

    asked = []
    monkeypatch.setattr(TensorParallel, "smallest", lambda tp, number, device: asked.append(number) or number)
    monkeypatch.setattr(worker, "can_share_memory", lambda *_: True)
    monkeypatch.setattr(worker, "share_memory", share_memory)
    tp = TensorParallel(rank=1, size=2)
    with pytest.warns(RuntimeWarning, match="no peer access"):
        assert worker._with_one_shot(tp, torch.device("cpu")) is tp
    assert asked == [True, False], "the other ranks must hear of it"


def test_one_rank_sums_nothing() -> None:
    tp = TensorParallel()
    assert worker._with_one_shot(tp, torch.device("cpu")) is tp
