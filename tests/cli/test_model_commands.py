"""`memory` and `check-model` on tiny checkpoints."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.cli.check_model import Difference, compare, first_different
from nanovllm.cli.main import main
from nanovllm.cli.memory import count_parameters, kv_bytes_of, largest_tensor, slot_bytes
from nanovllm.llm import LLM
from nanovllm.models.registry import read_model_config
from nanovllm.runner.host_memory import HostMemory
from nanovllm.weights.checkpoint import open_checkpoint
from tests.tiny_models import (
    EOS,
    VOCAB_WITH_TOKENIZER,
    edit_json,
    inner_model,
    load_hugging_face,
    save_random,
    save_tokenizer,
)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("LlamaForCausalLM", {"tie_word_embeddings": True}),
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", {"head_dim": 16}),
    ],
)
def test_parameters_are_counted_exactly(tmp_path: Path, architecture: str, config: dict[str, object]) -> None:
    folder = save_random(tmp_path, architecture, **config)
    hf = open_checkpoint(str(folder), load_format="dummy", revision=None).config
    theirs = load_hugging_face(folder)
    number = sum(p.numel() for p in theirs.parameters())
    config = read_model_config(hf, "float32")
    assert count_parameters(config) == (number, 4 * number)
    assert number < count_parameters(config, "int8")[1] < 3 * number


def test_memory_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_random(tmp_path)
    (folder / "model.safetensors").unlink()
    assert main(["memory", str(folder), "--max-model-len", "100", "--max-num-seqs", "8", "--dtype", "float32"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"loading +0\.00 GiB +at most", shown)
    assert "8 x 100 tokens at 0.2 KiB each" in shown  # 2 layers, K and V, 2 heads of 8, 4 bytes: 256 bytes
    assert "free" in shown


def test_memory_counts_the_slots_of_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_random(tmp_path, hidden_size=32, intermediate_size=48)
    config = read_model_config(open_checkpoint(str(folder), load_format="dummy", revision=None).config, "float32")
    options: dict[str, Any] = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 20}
    with LLM(str(folder), device="cpu", dtype="float32", skip_tokenizer_init=True, **options) as llm:
        assert slot_bytes(config, 3, 20) == inner_model(llm).adapters.num_bytes
    assert main(["memory", str(folder), "--max-loras", "3", "--max-lora-rank", "20", "--dtype", "float32"]) == 0
    assert re.search(r"adapters +0\.00 GiB +3 of rank 20, of all layers", capsys.readouterr().out)


def test_memory_knows_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one layer of two: 4 inputs of 80 channels less one, and 4 matrices of 8 x 12, 4 bytes each."""
    folder = save_random(tmp_path, "Qwen3_5ForCausalLM")
    config = read_model_config(json.loads((folder / "config.json").read_text()), "float32")
    assert config.bytes_per_state == 4 * ((2 * 2 * 8 + 4 * 12) * 3 + 4 * 8 * 12)
    assert kv_bytes_of(config, 100) == 100 * 2 * 2 * 16 * 4, "the other layer has attention"
    assert main(["memory", str(folder), "--max-num-seqs", "8"]) == 0
    out = capsys.readouterr().out
    assert "states " in out and "8 at 0.0 MiB each, of any length" in out and "keep the last" not in out


def test_memory_knows_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer_types = ["sliding_attention", "full_attention"]
    folder = save_random(tmp_path, "Gemma2ForCausalLM", head_dim=8, sliding_window=9, layer_types=layer_types)
    assert main(["memory", str(folder), "--max-model-len", "100", "--max-num-seqs", "8", "--dtype", "float32"]) == 0
    # 128 bytes a layer: all 100 tokens of one, the last 9 and the one that comes of the other
    assert "8 x 100 tokens at 0.1 KiB each; 1 of 2 layers keep the last 9" in capsys.readouterr().out
    config = read_model_config(open_checkpoint(str(folder), load_format="dummy", revision=None).config, "float32")
    assert kv_bytes_of(config, 100) == 128 * (100 + 10)
    assert kv_bytes_of(config, 8) == 128 * 2 * 8, "no window is left"


def test_loading_takes_one_tensor_beside_the_weights(tmp_path: Path) -> None:
    hf = open_checkpoint(str(save_random(tmp_path)), load_format="dummy", revision=None).config
    assert largest_tensor(read_model_config(hf, "float32")) == 4 * 128 * 32  # the embedding
    assert largest_tensor(read_model_config({**hf, "intermediate_size": 200}, "bfloat16")) == 2 * 200 * 32


def test_memory_is_told_against_what_an_engine_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only against what is free: the engine keeps to its share."""
    folder = save_random(tmp_path)
    monkeypatch.setattr("nanovllm.cli.memory.host_memory", lambda: HostMemory(total=1 << 30, available=1 << 29))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["memory", str(folder), "--max-model-len", "100", "--max-num-seqs", "8"]
    for utilization, fits in (("0.25", "yes"), ("0.00001", "no")):
        assert main([*command, "--gpu-memory-utilization", utilization]) == 0
        rows = {line[:10].strip(): line[10:24].strip() for line in capsys.readouterr().out.splitlines()}
        assert rows["free"] == "0.50 GiB" and rows["may use"] == f"{float(utilization):.2f} GiB"
        assert rows["fits"] == fits


def test_memory_refuses_what_the_model_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_random(tmp_path)
    assert main(["memory", str(folder), "--max-model-len", "1000"]) == 2
    assert "256 positions" in capsys.readouterr().err
    edit_json(folder / "config.json", architectures=["MambaForCausalLM"])
    assert main(["memory", str(folder)]) == 2
    assert "'MambaForCausalLM' is not supported" in capsys.readouterr().err


FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 20},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "SmolLM3ForCausalLM": {"no_rope_layers": [1, 0, 1]},
    "Gemma2ForCausalLM": {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0, "sliding_window": 20},
    "Gemma3ForCausalLM": {"sliding_window": 20, "sliding_window_pattern": 2, "head_dim": 16},
    "Phi3ForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "GraniteForCausalLM": {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["attention"] * 3, "residual_multiplier": 0.4},
    "Cohere2ForCausalLM": {"sliding_window": 20},
    "Qwen3MoeForCausalLM": {},
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_check_model_agrees_or_names_the_first_layer_that_differs(
    tmp_path: Path, architecture: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every position of every prompt matches Hugging Face; and where one layer does not, that one is named."""
    folder = save_random(tmp_path, architecture, num_hidden_layers=3, **FAMILIES[architecture])
    assert main(["check-model", str(folder), "--tolerance", "1e-4"]) == 0
    num_prompts = 4 if "sliding_window" in FAMILIES[architecture] else 3
    assert f"{num_prompts} of {num_prompts} prompts agree" in capsys.readouterr().out
    theirs = load_hugging_face(folder)
    with torch.no_grad():
        theirs.model.layers[1].self_attn.o_proj.weight[0] += 0.5
    monkeypatch.setattr("nanovllm.cli.check_model.load_hugging_face", lambda name, revision: theirs)
    assert main(["check-model", str(folder)]) == 1
    shown = capsys.readouterr().out
    assert "logits DIFFER" in shown
    assert "first stage that differs: layer 1," in shown
    assert f"0 of {num_prompts} prompts agree" in shown


@pytest.mark.parametrize("architecture", ["Lfm2ForCausalLM", "Qwen3_5ForCausalLM", "NemotronHForCausalLM"])
def test_check_model_agrees_where_layers_keep_states(
    tmp_path: Path, architecture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Last norms by other names, and layers of which two are one here."""
    folder = save_random(tmp_path, architecture)
    assert main(["check-model", str(folder), "--tolerance", "1e-4"]) == 0
    assert "3 of 3 prompts agree" in capsys.readouterr().out


def test_check_model_compares_text_and_ends_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are compared some rows at a time, so that a large vocabulary needs no memory; it is all the same."""
    monkeypatch.setattr("nanovllm.cli.check_model._LOGITS_AT_ONCE", 272 * 7)
    folder = save_random(tmp_path, vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS)
    save_tokenizer(folder)
    assert main(["check-model", str(folder)]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == (
        "check-model: PASS logits=3/3 token_ids=12/12 chat_template=1/1 stop_tokens=1/1"
    )
    assert "prompt 3 of 3 ..." in shown.err
    other = tmp_path / "other"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (other / name).write_text((folder / name).read_text())
    edit_json(other / "generation_config.json", eos_token_id=[EOS, 5])
    edit_json(other / "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}")
    if (folder / "chat_template.jinja").exists():
        (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"] |= {"a": 98, "b": 97}
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert main(["check-model", str(folder), "--tokenizer", str(other)]) == 1
    shown = capsys.readouterr()
    assert re.search(r"token ids: DIFFER \(\d+ of 12\): .* from token \d+ on: \[9[78], ", shown.out)
    assert "chat template: DIFFER" in shown.out
    assert "stop tokens: DIFFER (0 of 1): [257] and [5, 257]" in shown.out
    assert shown.out.splitlines()[-1].startswith("check-model: FAIL logits=3/3 token_ids=")


def test_not_a_number_never_agrees() -> None:
    ours = {"layer 0": torch.ones(2, 2), "logits": torch.full((2, 2), torch.nan)}
    theirs = {"layer 0": torch.ones(2, 2), "logits": torch.ones(2, 2)}
    differences = compare(ours, theirs)
    assert first_different(differences, 1e-3).stage == "logits"
    assert not differences[-1].largest <= 1e9


def test_a_stage_differs_relative_to_its_own_size() -> None:
    stages = [Difference("layer 0", 0.01, 1000.0), Difference("layer 1", 0.01, 1.0), Difference("logits", 1.0, 1.0)]
    assert first_different(stages, 1e-3).stage == "layer 1"


def test_different_decoders_are_not_compared() -> None:
    with pytest.raises(ValueError, match="stages"):
        compare({"layer 0": torch.ones(1)}, {"layer 0": torch.ones(1), "layer 1": torch.ones(1)})
