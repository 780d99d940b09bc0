"""PEFT's own adapters, as it saves them, beside what PEFT computes; skipped where it is not installed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.lora.request import LoRARequest
from tests.lora.test_adapters_merged import PROMPTS, make_llm, prompt_logprobs
from tests.tiny_models import load_hugging_face, save_random

peft = pytest.importorskip("peft")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": [*PROJECTIONS, "embed_tokens", "lm_head"]},
        {"target_modules": PROJECTIONS, "use_rslora": True, "rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 3},
         "alpha_pattern": {"layers.0.*": 5}},
        {"target_modules": PROJECTIONS, "bias": "all"},
        {"target_modules": PROJECTIONS, "bias": "lora_only"},
        {"target_modules": ["q_proj", "down_proj"], "lora_bias": True},
        {"target_modules": PROJECTIONS, "init_lora_weights": "orthogonal"},
    ],
)  # fmt: skip
@torch.no_grad()
def test_equals_peft(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = save_random(tmp_path / "model", "Qwen2ForCausalLM")
    torch.manual_seed(0)
    model = peft.get_peft_model(load_hugging_face(folder), peft.LoraConfig(r=4, lora_alpha=6, **config))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "lora" in name or "bias" in name
            parameter += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "adapter")
    with make_llm(folder) as llm:
        from_folder = prompt_logprobs(llm, PROMPTS, LoRARequest("folder", tmp_path / "adapter"))
        state = peft.get_peft_model_state_dict(model)
        from_tensors = prompt_logprobs(llm, PROMPTS, LoRARequest("tensors", state, model.peft_config["default"]))
    for prompt, one, other in zip(PROMPTS, from_folder, from_tensors, strict=True):
        logits = model(torch.tensor([prompt])).logits[0, :-1]
        want = logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        torch.testing.assert_close(one, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other, want, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_pissa_is_refused_as_it_is_and_right_once_converted(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", "Qwen2ForCausalLM")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa")
    model = peft.get_peft_model(load_hugging_face(folder), config)
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide to the conversion says
    model.save_pretrained(tmp_path / "begun")
    model.peft_config["default"].init_lora_weights = "pissa"
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "pissa")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "begun"))
    prompt = PROMPTS[0]
    logits = model(torch.tensor([prompt])).logits[0, :-1]
    want = logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    with make_llm(folder) as llm:
        with pytest.raises(NotImplementedError, match="'pissa' changes the base model"):
            llm.add_lora(LoRARequest("pissa", tmp_path / "pissa"))
        (got,) = prompt_logprobs(llm, [prompt], LoRARequest("plain", tmp_path / "plain"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
