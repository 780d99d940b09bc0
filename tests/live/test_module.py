"""An engine on the parameters of a transformers model in this process: what is shared, and after a step of training."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM
from tests.live.new_weights import GREEDY, OPTIONS, PROMPTS, generate, make_llm
from tests.tiny_models import save_random

# Of each family, the parameters that an engine has in another form, and so copies.
CASES: list[tuple[str, dict[str, Any], set[str]]] = [
    ("LlamaForCausalLM", {}, set()),
    ("Qwen3ForCausalLM", {"tie_word_embeddings": True}, set()),
    ("Qwen2ForCausalLM", {}, {"q_proj.bias", "k_proj.bias", "v_proj.bias"}),
    ("Gemma3ForCausalLM", {"tie_word_embeddings": False}, {"layernorm.weight", "norm.weight"}),
    ("GlmForCausalLM", {}, {"_proj.bias", "q_proj.weight", "k_proj.weight", "gate_up_proj.weight"}),
]


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train(module: Any) -> None:
    """A step that changes every parameter, in place as optimizers do."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    ids = torch.tensor([PROMPTS[2]])
    module(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(("architecture", "config", "copied"), CASES, ids=[case[0] for case in CASES])
def test_a_step_of_training_and_one_call(
    tmp_path: Path, architecture: str, config: dict[str, Any], copied: set[str]
) -> None:
    folder = save_random(tmp_path / "old", architecture, **config)
    module = load(folder)
    with LLM(module, **OPTIONS) as llm, make_llm(folder) as other:
        assert generate(llm) == generate(other)
        train(module)
        assert {name for name, _ in llm._changed()} == {
            name for name, _ in module.named_parameters() if any(name.endswith(end) for end in copied)
        }
        assert llm.update_weights() == 1
        module.save_pretrained(tmp_path / "new")
        with make_llm(tmp_path / "new") as fresh:
            assert generate(llm) == generate(fresh) != generate(other)


def test_the_module_still_trains_and_is_saved_as_before(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "old")
    module, alone = load(folder), load(folder)
    with LLM(module, **OPTIONS) as llm:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        for one in (module, alone):
            train(one)
            train(one)
        for (name, parameter), other in zip(module.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(parameter, other, msg=name)
        llm.sleep(level=2)
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), alone.parameters(), strict=True))
        llm.wake_up()
        llm.update_weights()
        moved = module.model.layers[0].mlp.up_proj.weight
        moved.data = moved.data.clone() * 2  # not in place, as some libraries do
        llm.update_weights()
        module.save_pretrained(tmp_path / "new")
        with make_llm(tmp_path / "new") as fresh:
            assert generate(llm) == generate(fresh)
    assert torch.equal(module.model.embed_tokens.weight, module.state_dict()["model.embed_tokens.weight"])


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    module = load(save_random(tmp_path))
    for options in ({"tensor_parallel_size": 2}, {"data_parallel_size": 2}, {"engine_process": True}):
        with pytest.raises(NotImplementedError, match="a model in this process is run in this process"):
            LLM(module, **{**OPTIONS, **options})
    with pytest.raises(ValueError, match="no parameters with values"):
        LLM(module.to("meta"), **OPTIONS)
    with make_llm(tmp_path) as llm, pytest.raises(TypeError, match="needs weights"):
        llm.update_weights()
