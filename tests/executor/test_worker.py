"""What a rank does by itself: sums, all of them or none, and weights in the form that they are multiplied in."""

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm import LLM
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.executor import worker
from nanovllm.layers.linear import LinearBase
from nanovllm.layers.weight_specs import WeightSpec
from tests.tiny_models import save_random

SIZES: Any = (SimpleNamespace(max_num_seqs=4), SimpleNamespace(hidden_size=64, vocab_size=128, dtype="bfloat16"))


def test_ranks_that_cannot_map_memory_leave_sums_to_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def share_memory(*_: object) -> None:
        raise RuntimeError("no peer access")

    asked = []
    monkeypatch.setattr(TensorParallel, "smallest", lambda tp, number, device: asked.append(number) or number)
    monkeypatch.setattr(worker, "can_share_memory", lambda *_: True)
    monkeypatch.setattr(worker, "share_memory", share_memory)
    tp = TensorParallel(rank=1, size=2)
    with pytest.warns(RuntimeWarning, match="no peer access"):
        assert worker._with_kernels(tp, torch.device("cpu"), *SIZES) is tp
    assert asked == [True, False], "the other ranks must hear of it"


def test_one_rank_sums_nothing() -> None:
    tp = TensorParallel()
    assert worker._with_kernels(tp, torch.device("cpu"), *SIZES) is tp


def test_weights_in_another_form_are_not_held_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fills the weights is gone when layers put them into the form they are multiplied in."""
    num_held = []

    def count_specs(layer: LinearBase) -> None:
        num_held.append(sum(type(thing) is WeightSpec for thing in gc.get_objects()))

    monkeypatch.setattr(LinearBase, "finish", count_specs)
    LLM(str(save_random(tmp_path)), device="cpu", skip_tokenizer_init=True).close()
    assert num_held and not any(num_held)
