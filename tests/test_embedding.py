"""LLM.embed: vectors of texts, beside what Hugging Face's pooling makes of its own hidden states."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm import LLM, SamplingParams
from tests.tiny_models import load_hugging_face, random_prompts, save_random

PROMPTS = random_prompts([1, 7, 40, 16], seed=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("random"), "Qwen3ForCausalLM", head_dim=8)


@pytest.fixture(scope="module")
def hugging_face(folder: Path) -> Any:
    return load_hugging_face(folder)


@pytest.fixture(
    scope="module",
    params=[{}, {"max_num_batched_tokens": 9, "max_num_seqs": 2}, {"num_gpu_blocks_override": 9, "max_model_len": 64}],
    ids=str,
)
def llm(request: pytest.FixtureRequest, folder: Path) -> Iterator[LLM]:
    options = {"device": "cpu", "dtype": "float32", "block_size": 8, "skip_tokenizer_init": True, **request.param}
    with LLM(str(folder), **options) as llm:
        yield llm


@torch.no_grad()
def expected(hugging_face: Any, prompt: list[int], pooling: str) -> Tensor:
    states = hugging_face.model(torch.tensor([prompt])).last_hidden_state[0]
    pooled = states[-1] if pooling == "last" else states.mean(0)
    return pooled / pooled.norm()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_vectors_are_hugging_faces(llm: LLM, hugging_face: Any, pooling: str) -> None:
    """Also the second time, when the prefix cache holds the prompts."""
    for _ in range(2):
        outputs = llm.embed(PROMPTS, pooling=pooling)
        assert [output.prompt_token_ids for output in outputs] == PROMPTS
        for output, prompt in zip(outputs, PROMPTS, strict=True):
            vector = torch.tensor(output.outputs.embedding)
            torch.testing.assert_close(vector, expected(hugging_face, prompt, pooling), atol=1e-4, rtol=1e-4)
    metrics = llm.get_metrics()
    assert metrics["num_free_blocks"] == metrics["num_blocks"]


def test_dimensions_and_length(llm: LLM) -> None:
    (raw,) = llm.embed(PROMPTS[1], normalize=False)
    (cut,) = llm.embed(PROMPTS[1], dimensions=4)
    head = torch.tensor(raw.outputs.embedding[:4])
    torch.testing.assert_close(torch.tensor(cut.outputs.embedding), head / head.norm())


def test_states_behind_the_last_norm_are_captured_beside_layers(llm: LLM, hugging_face: Any) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, capture={"layers": [0, "norm"]})
    (output,) = llm.generate([PROMPTS[1]], params, use_tqdm=False)
    states = output.outputs[0].hidden_states
    assert states is not None
    token_ids = (PROMPTS[1] + output.outputs[0].token_ids)[:-1]
    with torch.no_grad():
        all_states = hugging_face.model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states
    for layer, index in ((0, 1), ("norm", -1)):
        torch.testing.assert_close(states[layer], all_states[index][0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pooling": "cls"}, "'last' or 'mean'"), ({"dimensions": 0}, "at least 1"), ({"dimensions": 99}, "have 32")],
)
def test_what_is_wrong_is_named(llm: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.embed(PROMPTS, **options)
