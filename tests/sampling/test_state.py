from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.sampling.draw_columns import DrawColumns
from nanovllm.sampling.sampler import Sampler
from nanovllm.sampling.stages.min_tokens import MinTokens
from nanovllm.sampling_params import SamplingParams
from nanovllm.structured_outputs import StructuredOutputsParams
from tests.sampling.requests import begin, enter


def test_select_returns_what_was_set_last() -> None:
    sampler = Sampler(4, 100, "cpu")
    enter(sampler, 2, SamplingParams(temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, min_tokens=3), 5, 10, [1])
    enter(sampler, 0, SamplingParams(temperature=0), 6, 10, [1])
    state, min_tokens = sampler.columns, min_tokens_of(sampler)
    params = state.select(torch.tensor([2, 0, 2], dtype=torch.int32))
    assert params.seed.tolist() == [5, 6, 5]
    assert params.temperature.tolist() == [0.5, 0.0, 0.5]
    assert params.top_k.tolist() == [7, 0, 7]
    assert min_tokens.min_length.tolist() == [0, 0, 13, 0]
    assert torch.equal(params.top_p, torch.tensor([0.9, 1.0, 0.9]))
    assert torch.equal(params.min_p, torch.tensor([0.1, 0.0, 0.1]))
    enter(sampler, 2, SamplingParams(), 9, 1, [1])
    again = state.select(torch.tensor([2]))
    assert [column.item() for column in again] == [9, 1.0, 0.0, 1.0, 0, 1.0, 0.0, 0.0]
    assert min_tokens.min_length[2] == 0


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 2**63, 2**64 - 1, 2**64 + 3, -(2**63)])
def test_seeds_are_taken_modulo_two_to_the_64(seed: int) -> None:
    state = DrawColumns(1, 10, "cpu")
    state.set_row(0, SamplingParams(), seed)
    assert state.select(torch.tensor([0])).seed.item() % 2**64 == seed % 2**64


def test_filters_that_keep_all_are_off() -> None:
    state = DrawColumns(1, 10, "cpu")
    for top_k in (-1, 0, 10, 2**40):
        state.set_row(0, SamplingParams(top_k=top_k), 0)
        assert state.host["top_k"][0] == 0


def min_tokens_of(sampler: Sampler) -> MinTokens:
    assert sampler.pipeline is not None
    (stage,) = (stage for stage in sampler.pipeline.stages if isinstance(stage, MinTokens))
    return stage


def test_min_tokens_holds_back_known_ids_only() -> None:
    sampler = Sampler(1, 10, "cpu")
    enter(sampler, 0, SamplingParams(min_tokens=5, max_tokens=None), 0, 2**31 - 3, [9, 10, -1, 3, 3])
    assert min_tokens_of(sampler).stop_ids[0].tolist() == [3, 9]
    assert min_tokens_of(sampler).min_length[0] == 2**31 + 2
    enter(sampler, 0, SamplingParams(min_tokens=5), 0, 7, [10])
    assert min_tokens_of(sampler).min_length[0] == 0, "nothing to hold back, so the stage is off"


def test_greedy_is_exactly_zero() -> None:
    """A temperature that counts as greedy is stored as 0, whatever its digits."""
    state = DrawColumns(1, 10, "cpu")
    state.set_row(0, SamplingParams(temperature=9e-6), 0)
    assert state.host["temperature"][0] == np.float32(0)


def test_upload_keeps_one_tensor() -> None:
    """A captured graph reads `columns`, so new rows must show up there and not in a new tensor."""
    state = DrawColumns(2, 10, "cpu")
    columns = state.columns
    state.set_row(1, SamplingParams(top_k=3), 5)
    assert not columns.any()
    assert state.upload() is columns
    assert columns.numpy().tobytes() == state.host.tobytes()


@pytest.mark.parametrize(
    ("options", "is_plain"),
    [
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "prompt_logprobs": 1}, True),
        ({"min_tokens": 2}, False),
        ({"logprobs": 0}, False),
        ({"presence_penalty": 0.5}, False),
        ({"logit_bias": {1: 1.0}}, False),
        ({"allowed_token_ids": [1]}, False),
    ],
)
def test_which_rows_ask_for_more(options: dict[str, Any], is_plain: bool) -> None:
    """A row counts only for steps that it is in, and until somebody else takes it."""
    sampler = Sampler(3, 10, "cpu")
    enter(sampler, 0, SamplingParams(**options), 0, 1, [3], [5])
    assert sampler.is_plain([0, 1]) == is_plain
    assert sampler.is_plain([1, 2])
    enter(sampler, 0, SamplingParams(temperature=0), 0, 1, [3])
    assert sampler.is_plain([0, 1, 2])


def test_processors_and_grammars_are_not_plain() -> None:
    sampler = Sampler(2, 10, "cpu", [lambda token_ids, logits: logits])
    assert sampler.is_plain([1])
    enter(sampler, 1, SamplingParams(), 0, 1, [])
    assert not sampler.is_plain([1])
    sampler = Sampler(2, 10, "cpu")
    enter(sampler, 1, SamplingParams(structured_outputs=StructuredOutputsParams(regex="a")), 0, 1, [])
    begin(sampler, grammar_bitmask={1: np.zeros(1, dtype=np.int32)})
    assert not sampler.is_plain([1])
