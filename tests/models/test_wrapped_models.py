"""Text models inside multimodal checkpoints, beside transformers, which runs the whole without an image."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nanovllm.cli.main import main
from nanovllm.models.registry import read_model_config
from nanovllm.weights.checkpoint import open_checkpoint
from nanovllm.weights.wrapped import text_config, text_name
from tests.models.parity import check_greedy_tokens, check_logits, make_llm
from tests.models.wrapped import save_wrapped
from tests.tiny_models import edit_json, hugging_face_greedy, random_prompts


@pytest.fixture(
    scope="module",
    params=[
        *("Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration", "Qwen3VLForConditionalGeneration"),
        *("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration", "Gemma4ForConditionalGeneration"),
    ],
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wrapped(tmp_path_factory.mktemp("model"), request.param)


def hugging_face(folder: Path) -> Any:
    model_class = transformers.AutoModelForImageTextToText
    return model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.filterwarnings("ignore:.*only the text model is read")
@pytest.mark.parametrize("max_num_batched_tokens", [256, 5], ids=["whole", "chunked"])
def test_logits_equal_those_of_the_whole(folder: Path, max_num_batched_tokens: int) -> None:
    check_logits(folder, hugging_face(folder), max_num_batched_tokens)


@pytest.mark.filterwarnings("ignore:.*only the text model is read")
def test_the_text_model_says_which_one_it_is(tmp_path: Path) -> None:
    """Ministral 3 and Mistral Small 3 are wholes of one name; the first scales its queries."""
    rope = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 16}
    fields = {"model_type": "ministral3", "rope_parameters": {**rope, "llama_4_scaling_beta": 0.7}}
    check_logits(save_wrapped(tmp_path, "Mistral3ForConditionalGeneration", **fields), hugging_face(tmp_path), 16)


@pytest.mark.filterwarnings("ignore:.*only the text model is read")
def test_greedy_tokens_equal_those_of_the_whole(folder: Path) -> None:
    prompts = random_prompts([1, 40, 3, 17])
    theirs = hugging_face(folder)
    expected = [hugging_face_greedy(theirs, prompt, 12) for prompt in prompts]
    options = {"num_gpu_blocks_override": 8, "block_size": 8, "enable_prefix_caching": False}
    check_greedy_tokens(folder, prompts, expected, preempts=True, **options)


def test_what_is_left_out_is_said(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"only the text model is read; \d+ tensors of .*vis.* are left out"):
        checkpoint = open_checkpoint(str(folder), load_format="auto", revision=None)
    assert not any(re.search("vis|projector", name) for name, _ in checkpoint.headers())


@pytest.mark.filterwarnings("ignore:.*only the text model is read")
def test_check_model_compares_the_text_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-model", str(folder)]) == 0
    assert "check-model: PASS logits=" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*only the text model is read")
def test_both_spellings_of_names_and_a_tensor_of_no_part(folder: Path, tmp_path: Path) -> None:
    """transformers 5 and those before it name the parts of the whole in other ways."""
    tensors = load_file(folder / "model.safetensors")
    text = {text_name(name): tensor for name, tensor in tensors.items() if text_name(name) is not None}
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for model, head, vision in (
        ("model.language_model.", "lm_head.", "model.visual.x"),
        ("language_model.model.", "language_model.lm_head.", "vision_tower.x"),
    ):
        spelt = {name.replace("model.", model, 1).replace("lm_head.", head): tensor for name, tensor in text.items()}
        save_file({**spelt, vision: torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        make_llm(tmp_path).close()
        save_file({**spelt, "audio.weight": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"'audio\.weight', which this model does not have"):
            make_llm(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    edit_json(tmp_path / "config.json", text_config={**config["text_config"], "attention_chunk_size": 64})
    with pytest.raises(ValueError, match="attention_chunk_size=64 is not supported"):
        make_llm(tmp_path)
    edit_json(tmp_path / "config.json", text_config=[1])
    with pytest.raises(ValueError, match=r"config\.json: text_config must be an object"):
        make_llm(tmp_path)


def test_what_gemma_3_leaves_out_of_its_config_is_transformers_default() -> None:
    """The 4B's says five numbers."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    text |= {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    config = read_model_config({"architectures": ["Gemma3ForConditionalGeneration"], **text}, "bfloat16")
    theirs = transformers.Gemma3TextConfig(**{name: value for name, value in text.items() if name != "model_type"})
    for ours, name in (("vocab_size", "vocab_size"), ("num_heads", "num_attention_heads"), ("head_dim", "head_dim")):
        assert getattr(config, ours) == getattr(theirs, name)
    assert (config.num_kv_heads, config.tie_word_embeddings) == (theirs.num_key_value_heads, theirs.tie_word_embeddings)
    assert config.ropes[5].theta == theirs.rope_parameters["full_attention"]["rope_theta"]


def test_a_quantization_that_the_whole_states_is_the_texts() -> None:
    stated = {"quant_method": "fp8", "modules_to_not_convert": ["model.vision_tower", "model.language_model.layers.0"]}
    whole = {"quantization_config": stated, "text_config": {"hidden_size": 8}}
    read = text_config(whole, Path())["quantization_config"]
    assert read == {**stated, "modules_to_not_convert": ["model.vision_tower", "model.layers.0"]}


def test_names() -> None:
    assert text_name("model.language_model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert text_name("language_model.lm_head.weight") == "lm_head.weight"
    assert text_name("model.visual.x") is None and text_name("multi_modal_projector.x") is None
    assert text_name("model.norm.weight") == "model.norm.weight"
