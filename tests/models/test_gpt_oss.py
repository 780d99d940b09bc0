"""gpt-oss beside Hugging Face, with its experts as they are and in MXFP4, and what is refused of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.parity import (
    check_captured_steps,
    check_deterministic_bits,
    check_every_way_of_running,
    greedy_tokens,
    make_llm,
    prompts_that_share,
)
from tests.tiny_models import edit_json, save_random

CONFIG: dict[str, Any] = {
    **{"head_dim": 16, "hidden_size": 64, "intermediate_size": 32, "num_local_experts": 6, "num_experts_per_tok": 3},
    **{"sliding_window": 20, "swiglu_limit": 1.5},  # so low that it is met
}
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def save(folder: Path, is_packed: bool = False, **config: Any) -> Path:
    save_random(folder, "GptOssForCausalLM", **{**CONFIG, **config})
    if is_packed:
        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            num_experts, inputs, outputs = tensors.pop(name).shape
            shape = (num_experts, outputs, inputs // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(122, 126, shape, dtype=torch.uint8)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        edit_json(folder / "config.json", quantization_config=MXFP4)
    return folder


@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "mxfp4"])
def test_every_way_of_running_equals_hugging_face(tmp_path: Path, is_packed: bool) -> None:
    prompts = prompts_that_share()
    options = {"max_num_batched_tokens": 128, "num_blocks": 20, "num_cached": 64 + 16 + 48}
    check_every_way_of_running(save(tmp_path, is_packed), prompts, **options)


def test_random_experts_in_mxfp4(tmp_path: Path) -> None:
    """load_format="dummy" of a quantized checkpoint: what it says is all that is read."""
    folder = save(tmp_path, is_packed=True)
    (folder / "model.safetensors").unlink()
    first, again = (greedy_tokens(folder, load_format="dummy", seed=3) for _ in range(2))
    assert first == again and len({token for tokens in first for token in tokens}) > 1


def test_captured_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_captured_steps(save(tmp_path), monkeypatch)


def test_deterministic_bits_are_those_of_a_miss(tmp_path: Path) -> None:
    folder = save(tmp_path)
    check_deterministic_bits(folder, prompt_len=60, num_before=40)


def test_released_config_files_mean_the_same(tmp_path: Path) -> None:
    """They spell some fields as transformers did before 5, and leave out what is a default now."""
    folder = save(tmp_path)
    expected, path = greedy_tokens(folder), folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    old = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "initial_context_length": 4096}
    for name in ("layer_types", "swiglu_alpha"):
        del config[name]
    path.write_text(json.dumps({**config, **old, "experts_per_token": 3}))
    assert greedy_tokens(folder) == expected
    path.write_text(json.dumps({**config, "rope_theta": old["rope_theta"]}))  # YaRN as released is the default, too
    assert greedy_tokens(folder) == expected


@pytest.mark.parametrize(
    ("is_packed", "options", "message"),
    [
        (True, {"deterministic": True}, "deterministic"),
        (False, {"quantization": "int8"}, "experts are held as they are, or in MXFP4"),
        (True, {"intermediate_size": 48}, "no multiple of 32"),
    ],
)
def test_what_is_refused(tmp_path: Path, is_packed: bool, options: dict[str, Any], message: str) -> None:
    sizes = {name: options.pop(name) for name in ("intermediate_size",) if name in options}
    folder = save(tmp_path, is_packed)
    edit_json(folder / "config.json", **sizes)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        make_llm(folder, **options)


@pytest.mark.parametrize("name", ["self_attn.sinks", "mlp.router.bias", "mlp.experts.down_proj_scales"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, is_packed=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.layers.1.{name}"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"no tensor 'model.layers.1.{name}'"):
        make_llm(folder)
