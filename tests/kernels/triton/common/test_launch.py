"""The switch for dependent launch: of one thread, for the length of a `with`. No GPU: its capability is made up."""

import threading

import pytest
import torch

from nanovllm.kernels.triton.common.launch import dependent_launch, has_dependent_launch

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm.kernels.triton.common.launch.compute_capability", lambda device: (9, 0))


def test_the_device_decides_where_the_switch_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_dependent_launch(GPU) and not has_dependent_launch(torch.device("cpu"))
    with dependent_launch(True):
        assert has_dependent_launch(GPU) and not has_dependent_launch(torch.device("cpu"))
    monkeypatch.setattr("nanovllm.kernels.triton.common.launch.compute_capability", lambda device: (8, 9))
    with dependent_launch(True):
        assert not has_dependent_launch(GPU)


def test_the_switch_ends_with_its_block_also_by_an_exception() -> None:
    with pytest.raises(ArithmeticError), dependent_launch(False):
        assert not has_dependent_launch(GPU)
        with dependent_launch(True):
            assert has_dependent_launch(GPU)
        assert not has_dependent_launch(GPU)
        raise ArithmeticError
    assert has_dependent_launch(GPU)


def test_the_switch_is_of_one_thread() -> None:
    answers: list[bool] = []
    with dependent_launch(False):
        thread = threading.Thread(target=lambda: answers.append(has_dependent_launch(GPU)))
        thread.start()
        thread.join()
    assert answers == [True]
