"""Hidden states of a request's tokens, beside Hugging Face's, however the engine runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.engine.scheduler_output import NewRow, SchedulerOutput
from nanovllm.runner.graphs.graph_runner import GraphRunner
from tests.runner.fake_graphs import fake_graphs
from tests.tiny_models import load_hugging_face, random_prompts, save_random

NUM_LAYERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("random"), num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def hugging_face(folder: Path) -> Any:
    return load_hugging_face(folder)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), device="cpu", dtype="float32", block_size=8, skip_tokenizer_init=True) as llm:
        yield llm


def capturing(layers: list[int], **options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 9, "capture": {"layers": layers}, **options})


@torch.no_grad()
def expected_states(hugging_face: Any, token_ids: list[int], layer: int) -> Tensor:
    """The residual stream behind a layer; behind the last one transformers shows it only after the last norm."""
    outputs = hugging_face.model(torch.tensor([token_ids]), output_hidden_states=True)
    return outputs.hidden_states[layer + 1][0]


def check(hugging_face: Any, output: Any, layers: list[int]) -> None:
    for completion in output.outputs:
        token_ids = (output.prompt_token_ids + completion.token_ids)[:-1]  # the last one is never fed back
        assert sorted(completion.hidden_states) == sorted(layers)
        for layer, states in completion.hidden_states.items():
            assert states.dtype == torch.float32 and states.device.type == "cpu"
            torch.testing.assert_close(states, expected_states(hugging_face, token_ids, layer), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overlap_depth": 2},
        {"max_num_batched_tokens": 7, "max_num_seqs": 4, "overlap_depth": 2},
        {"num_gpu_blocks_override": 10, "block_size": 8, "max_model_len": 80},
        {"num_gpu_blocks_override": 10, "block_size": 8, "max_model_len": 80, "overlap_depth": 2},
        {"enable_prefix_caching": False},
    ],
    ids=str,
)
def test_hidden_states_equal_those_of_hugging_face(folder: Path, hugging_face: Any, options: dict[str, Any]) -> None:
    """Of prompt and output, in chunks, after preemptions, beside requests that capture nothing or others."""
    prompts = random_prompts([30, 5, 21, 17])
    params = [capturing([0, 1]), SamplingParams(temperature=0, max_tokens=9), capturing([1]), capturing([0])]
    with LLM(str(folder), device="cpu", dtype="float32", skip_tokenizer_init=True, **options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert ("num_gpu_blocks_override" in options) == (llm.get_metrics()["num_preemptions"] > 0)
    for output, layers in zip(outputs, ([0, 1], None, [1], [0]), strict=True):
        if layers is None:
            assert output.outputs[0].hidden_states is None
        else:
            check(hugging_face, output, layers)


def test_a_prefix_hit_is_computed_again_for_its_hidden_states(llm: LLM, hugging_face: Any) -> None:
    """And who captures nothing still takes the blocks, those of a capturing request included."""
    (prompt,) = random_prompts([40], seed=3)
    for _ in range(2):
        (output,) = llm.generate([prompt], capturing([0, 1]), use_tqdm=False)
        assert output.num_cached_tokens == 0
        check(hugging_face, output, [0, 1])
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=9), use_tqdm=False)
    assert output.num_cached_tokens == 32


def test_n_outputs_have_their_own_hidden_states(llm: LLM, hugging_face: Any) -> None:
    (output,) = llm.generate(random_prompts([20]), capturing([0], n=3, temperature=1.0, seed=1), use_tqdm=False)
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 3
    check(hugging_face, output, [0])


def test_layers_count_from_the_end_as_python_does(llm: LLM) -> None:
    (prompt,) = random_prompts([6])
    (first,), (second,) = (llm.generate([prompt], capturing([layer]), use_tqdm=False) for layer in (-1, NUM_LAYERS - 1))
    assert torch.equal(first.outputs[0].hidden_states[-1], second.outputs[0].hidden_states[NUM_LAYERS - 1])


def test_deltas_bring_the_hidden_states_at_the_end(llm: LLM, hugging_face: Any) -> None:
    (prompt,) = random_prompts([6])
    *before, last = llm.stream([prompt], capturing([0]))
    assert before and all(output.outputs[0].hidden_states is None for output in before)
    assert len(last.outputs[0].hidden_states[0]) == 6 + 9 - 1


def test_steps_that_are_split_give_the_same(
    llm: LLM, folder: Path, hugging_face: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the part without captures is a CUDA graph."""
    prompts = random_prompts([30, 5, 21, 17])
    params = [
        capturing([0, 1], max_tokens=12),
        SamplingParams(temperature=1, seed=3, max_tokens=15, n=2),
        capturing([1]),
        SamplingParams(temperature=0, max_tokens=3),
    ]
    expected = llm.generate(prompts, params, use_tqdm=False)
    fake_graphs(monkeypatch)
    splits = []
    real = GraphRunner._run
    monkeypatch.setattr(
        GraphRunner, "_run", lambda self, plan: splits.append(len(plan.capture_layers)) or real(self, plan)
    )
    options = {"device": "cpu", "dtype": "float32", "block_size": 8, "skip_tokenizer_init": True}
    with LLM(str(folder), **options) as with_graphs:
        outputs = with_graphs.generate(prompts, params, use_tqdm=False)
    assert splits.count(0) > 5 and splits.count(2) > 5
    for output, wanted in zip(outputs, expected, strict=True):
        assert [c.token_ids for c in output.outputs] == [c.token_ids for c in wanted.outputs]
    check(hugging_face, outputs[0], [0, 1])
    check(hugging_face, outputs[2], [1])


@pytest.mark.parametrize("layer", [NUM_LAYERS, -NUM_LAYERS - 1])
def test_a_layer_that_does_not_exist_is_refused(llm: LLM, layer: int) -> None:
    with pytest.raises(ValueError, match=rf"prompts\[1\]: capture.*{layer}.*\[-3, 3\)"):
        llm.generate([[1], [2]], [capturing([0]), capturing([layer])], use_tqdm=False)
    assert not llm.has_unfinished_requests()


def test_a_step_can_be_split_by_row() -> None:
    """So that on a GPU those who capture run by themselves and the others keep their CUDA graph."""
    new = NewRow(
        row=4,
        num_computed_tokens=0,
        num_prompt_tokens=3,
        block_ids=[7],
        params=SamplingParams(),
        seed=0,
        stop_token_ids=(),
    )
    plan = SchedulerOutput(
        new_rows=[new],
        new_blocks=[(0, 2, 5), (2, 1, 6)],
        rows=[0, 2, 3, 4],
        num_scheduled_tokens=[1, 1, 1, 3],
        num_computed_tokens=[32, 16, 9, 0],
        num_samples=[1, 1, 1, 0],
        token_ids=[-1, 8, -1, 1, 2, 3],
        num_decodes=3,
    )
    own, others = plan.select([1, 3]), plan.select([0, 2])
    assert own.rows == [2, 4] and others.rows == [0, 3]
    assert own.token_ids == [8, 1, 2, 3] and others.token_ids == [-1, -1]
    assert own.new_rows == [new] and others.new_rows == []
    assert own.new_blocks == [(2, 1, 6)] and others.new_blocks == [(0, 2, 5)]
    assert own.num_samples == [1, 0] and own.num_decodes == 1 and others.num_decodes == 2
    assert own.num_computed_tokens == [16, 0] and own.num_scheduled_tokens == [1, 3]
