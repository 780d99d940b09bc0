"""Edits of logits by Triton against the stages in PyTorch, which their own tests compare with NumPy."""

import numpy as np
import pytest
import torch

from nanovllm.sampling.draw_columns import DrawColumns
from nanovllm.sampling.sampler import Sampler
from nanovllm.sampling.stages.grammar import apply_bitmask
from nanovllm.sampling.stages.penalties import apply_penalties
from nanovllm.sampling_params import SamplingParams
from tests.kernels.twins import DEVICE, DTYPES, load_twin, twin_test
from tests.sampling.requests import begin, enter, sampled

twin = load_twin("edit_logits")
pytestmark = twin_test

VOCAB_SIZE = 9000
ROWS = 6
OPTIONS = [
    {},
    {"repetition_penalty": 1.5},
    {"frequency_penalty": 0.5},
    {"presence_penalty": -1.5, "repetition_penalty": 0.7},
    {"presence_penalty": 2.0, "frequency_penalty": -0.1, "repetition_penalty": 1.1},
    {},
]


def to_device(array: list[int] | np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(array, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("penalises", "masks"), [(True, False), (False, True), (True, True)])
def test_rows_are_those_of_the_stages(dtype: torch.dtype, penalises: bool, masks: bool) -> None:
    """Rows in another order, some of which ask for nothing; whatever was counted for these is not looked at."""
    generator = torch.Generator().manual_seed(7)
    state = DrawColumns(ROWS, VOCAB_SIZE, "cpu")
    for row, option in enumerate(OPTIONS):
        state.set_row(row, SamplingParams(**option), 0)  # type: ignore[arg-type]
    counts = torch.randint(0, 6, (ROWS, VOCAB_SIZE), generator=generator, dtype=torch.int32)
    logits = torch.randn(ROWS, VOCAB_SIZE, generator=generator).to(dtype)
    logits[2, 50:] = -torch.inf
    members, rows, places = [4, 2, 0, 1, 3], [3, 5, 1, 0, 4], [1, 0, -1, -1, 2]
    words = torch.randint(-(2**31), 2**31, (3, -(-VOCAB_SIZE // 32) + 1), generator=generator).int()
    words[0] = 0
    words[0, 100:200] = 5  # nothing is left of these: row 2 has logits for others only
    words[2, 1] = 0

    want = logits[members].float()
    if penalises:
        params = state.select(torch.tensor(rows))
        penalties = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
        want = apply_penalties(want, counts[rows], *penalties)
    if masks:
        for index, place in enumerate(places):
            if place >= 0:
                want[index] = apply_bitmask(want[index][None], words[place][None])[0]
    got = twin.edit_logits_triton(
        logits.to(DEVICE), to_device(members, torch.int64), to_device(rows, torch.int32), state.upload().to(DEVICE),
        counts.to(DEVICE) if penalises else None, words.to(DEVICE) if masks else None,
        to_device(places, torch.int32) if masks else None,
    )  # fmt: skip
    torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-6)


def test_nobody() -> None:
    nobody = to_device([], torch.int64)
    logits, columns = torch.zeros(2, 8, device=DEVICE), DrawColumns(2, 8, "cpu").upload().to(DEVICE)
    assert twin.edit_logits_triton(logits, nobody, nobody.int(), columns, None, None, None).shape == (0, 8)


@pytest.mark.parametrize("has_single", [False, True])
@pytest.mark.parametrize("has_mask", [False, True])
def test_stages_together_are_those_one_by_one(has_single: bool, has_mask: bool) -> None:
    """Rows that ask for different stages, in the pipeline's two forms; what some ruled out, others do not revive."""
    from nanovllm.sampling.stages.edits_on_gpu import edit_on_gpu

    options = [{"presence_penalty": 1.5}, {}, {"repetition_penalty": 1.3}]
    if has_single:
        options[0] |= {"logit_bias": {3: 5.0, 8999: -2.0}}
        options[1] |= {"allowed_token_ids": [5, 6, 77]}
    sampler, on_gpu = Sampler(4, VOCAB_SIZE, "cpu"), Sampler(4, VOCAB_SIZE, DEVICE)
    mask = np.full(-(-VOCAB_SIZE // 32), 0b1101000, dtype=np.int32)
    for either in (sampler, on_gpu):
        for row, option in zip((0, 2, 3), options, strict=True):
            enter(either, row, SamplingParams(**option), 0, 3, [], token_ids=[3, 4, 5, 6, 6])  # type: ignore[arg-type]
        begin(either, grammar_bitmask={2: mask, 3: mask} if has_mask else {})
    logits = torch.randn(5, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    members, rows = np.array([4, 0, 2]), np.array([3, 0, 2], dtype=np.int32)
    assert sampler.pipeline is not None and on_gpu.pipeline is not None
    want = sampler.pipeline.edited(logits, members, sampled(rows, [9, 9, 9]))
    stages = on_gpu.pipeline.stages
    got = edit_on_gpu(
        logits.to(DEVICE), members, sampled(rows, np.array([9, 9, 9], dtype=np.int32), str(DEVICE)), stages[:-2],
        *stages[-2:],  # type: ignore[arg-type]
    )  # fmt: skip
    torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-6)
