"""Gemma 4 beside Hugging Face: heads of two sizes, shared keys and values, an input for each layer, experts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import SamplingParams
from nanovllm.cli.main import main
from tests.models.parity import (
    check_captured_steps,
    check_deterministic_bits,
    check_every_way_of_running,
    greedy_tokens,
    make_llm,
    prompts_that_share,
)
from tests.tiny_models import edit_json, load_hugging_face, random_prompts, save_random

SLIDING, FULL = "sliding_attention", "full_attention"
CASES: dict[str, dict[str, Any]] = {
    "like-e2b": {  # layers 4 and 5 read layers 2 and 3
        **{"num_hidden_layers": 6, "layer_types": [SLIDING, FULL] * 3, "num_kv_shared_layers": 2},
        **{"sliding_window": 20, "final_logit_softcapping": 20.0, "attention_bias": False},
    },
    "like-31b": {
        **{"num_hidden_layers": 4, "layer_types": [SLIDING, SLIDING, SLIDING, FULL], "num_kv_shared_layers": 0},
        **{"num_key_value_heads": 4, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
        **{"hidden_size_per_layer_input": 0, "sliding_window": 20},
    },
    "like-26b-a4b": {
        **{"layer_types": [SLIDING, FULL, FULL], "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
        **{"enable_moe_block": True, "top_k_experts": 3, "sliding_window": 20},
    },
}


def save(folder: Path, case: str = "like-e2b", **more: Any) -> Path:
    return save_random(folder, "Gemma4ForCausalLM", **{**CASES[case], **more})


@pytest.mark.parametrize(("case", "num_blocks"), [("like-e2b", 12), ("like-31b", 10), ("like-26b-a4b", 12)])
def test_every_way_of_running_equals_hugging_face(tmp_path: Path, case: str, num_blocks: int) -> None:
    prompts = prompts_that_share()
    options = {"max_num_batched_tokens": 128, "num_blocks": num_blocks, "num_cached": 64 + 16 + 48}
    check_every_way_of_running(save(tmp_path, case), prompts, **options)


@torch.no_grad()
def test_hidden_states_are_those_of_hugging_face(tmp_path: Path) -> None:
    folder, (prompt,) = save(tmp_path), random_prompts([20])
    with make_llm(folder) as llm:
        params = SamplingParams(temperature=0, max_tokens=3, capture={"layers": [0, 4]})
        (output,) = llm.generate([prompt], params, use_tqdm=False)
    token_ids = prompt + output.outputs[0].token_ids[:-1]
    expected = load_hugging_face(folder).model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states
    for layer, states in output.outputs[0].hidden_states.items():
        torch.testing.assert_close(states, expected[layer + 1][0], atol=1e-4, rtol=1e-4)


def test_captured_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_captured_steps(save(tmp_path), monkeypatch)


@pytest.mark.parametrize("case", ["like-e2b", "like-26b-a4b"])
def test_deterministic_bits_are_those_of_a_miss(tmp_path: Path, case: str) -> None:
    folder = save(tmp_path, case, final_logit_softcapping=None)  # a soft-cap is refused
    check_deterministic_bits(folder, prompt_len=60, num_before=40)


def test_released_checkpoints_mean_the_same(tmp_path: Path) -> None:
    """Their config.json say the global heads by themselves, and they hold tensors that nobody reads."""
    folder = save(tmp_path)
    expected, path = greedy_tokens(folder), folder / "config.json"
    config = json.loads(path.read_text())
    del config["per_layer_config"], config["rope_parameters"]  # the latter are the default, too
    path.write_text(json.dumps({**config, "global_head_dim": 32, "num_global_key_value_heads": None}))
    tensors = load_file(folder / "model.safetensors")
    for name in ("k_proj.weight", "v_proj.weight", "k_norm.weight"):
        tensors[f"model.layers.5.self_attn.{name}"] = tensors[f"model.layers.3.self_attn.{name}"] + 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert greedy_tokens(folder) == expected


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"use_bidirectional_attention": "all"}, {}, "use_bidirectional_attention='all'"),
        ({"num_kv_shared_layers": 5}, {}, "leaves no"),
        ({"per_layer_config": {"1": {"hidden_size": 8}}}, {}, "per_layer_config of hidden_size"),
    ],
)
def test_what_is_refused(tmp_path: Path, fields: dict[str, Any], options: dict[str, Any], message: str) -> None:
    folder = save(tmp_path)
    edit_json(folder / "config.json", **fields)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        make_llm(folder, **options)


def test_check_model_compares_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-model", str(save(tmp_path))]) == 0
    assert "check-model: PASS logits=" in capsys.readouterr().out
