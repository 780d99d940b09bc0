"""A model whose norms add up: ranks are played by a stand-in that knows every part, which is this one's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.sum_norm import sum_norm_reference
from nanovllm.layers.summing_norm import SummingNorm, put_sums_into_norms
from tests.tiny_models import inner_model, random_prompts, save_random

PROMPTS = random_prompts([3, 9, 1])
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=0)
CAPTURING = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, capture={"layers": [0, 1, "norm"]})


class Alone:
    """Of the sums it returns the rest is no number: nobody but the next call may read it."""

    def __init__(self, most_rows: int) -> None:
        self.most_rows, self.num_calls = most_rows, 0

    def takes(self, x: Tensor) -> bool:
        return x.shape[0] <= self.most_rows

    def __call__(
        self, x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, next_weight: Any = None
    ) -> tuple[Tensor, Tensor]:
        self.num_calls += 1
        return sum_norm_reference([x], residual, norm_weight, eps)


def outputs(llm: LLM) -> list[tuple[list[int], float]]:
    results = [one.outputs[0] for one in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    return [(one.token_ids, one.cumulative_logprob) for one in results]


def test_tokens_are_those_of_norms_behind_sums(tmp_path: Path) -> None:
    folder = save_random(tmp_path, "Qwen3ForCausalLM", num_hidden_layers=3)
    with LLM(str(folder), skip_tokenizer_init=True, dtype="float32", device="cpu", enable_prefix_caching=False) as llm:
        model, alone = inner_model(llm), Alone(most_rows=8)
        expected = outputs(llm)
        (states,) = llm.generate(PROMPTS[1:2], CAPTURING, use_tqdm=False)
        put_sums_into_norms(model, TensorParallel(sum_norm=alone))
        norms = [module for module in model.modules() if isinstance(module, SummingNorm)]
        assert len(norms) == 2 * 3
        assert outputs(llm) == [(tokens, pytest.approx(logprob, abs=1e-4)) for tokens, logprob in expected]
        assert alone.num_calls == 6 * 4, "in each step but that of the prompts, which are too long"
        (again,) = llm.generate(PROMPTS[1:2], CAPTURING, use_tqdm=False)
        for layer, tensor in states.outputs[0].hidden_states.items():
            torch.testing.assert_close(again.outputs[0].hidden_states[layer], tensor)
        assert alone.num_calls == 6 * 4, "who looks between layers sees sums"


@pytest.mark.parametrize("architecture", ["Gemma2ForCausalLM", "CohereForCausalLM", "Gemma4ForCausalLM"])
def test_other_orders_of_norms_stay_as_they_are(tmp_path: Path, architecture: str) -> None:
    folder = save_random(tmp_path, architecture)
    with LLM(str(folder), skip_tokenizer_init=True, dtype="float32", device="cpu") as llm:
        model = inner_model(llm)
        put_sums_into_norms(model, TensorParallel(sum_norm=Alone(8)))
        assert not any(isinstance(module, SummingNorm) for module in model.modules())
