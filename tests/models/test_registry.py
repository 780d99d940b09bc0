"""What the table of architectures promises, and models that another package brings along."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, Architecture, SamplingParams, register_model
from nanovllm.cli.main import main
from nanovllm.models import registry
from tests.tiny_models import (
    edit_json,
    hugging_face_greedy,
    hugging_face_logits,
    load_hugging_face,
    random_prompts,
    record_logits,
    save_random,
)

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding-a-model.md").read_text()
OUTSIDE = {
    "HeliumForCausalLM": {"head_dim": 8, "attention_bias": True},
    "NemotronForCausalLM": {"mlp_bias": True, "head_dim": 64, "norm_eps": 0.1},
}


@pytest.fixture
def no_registered_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The Python of docs/adding-a-model.md as a module `my_models` on sys.path."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    (tmp_path / "my_models.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_models", None)


def run(folder: Path, **options: Any) -> tuple[list[int], list[int], torch.Tensor]:
    """A prompt, its greedy output, and the logits of both."""
    prompt = random_prompts([41])[0]
    with LLM(str(folder), device="cpu", dtype="float32", skip_tokenizer_init=True, max_num_seqs=1, **options) as llm:
        logits = record_logits(llm)
        (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    return prompt, output.outputs[0].token_ids, logits()


@pytest.mark.parametrize("way", ["register_model", "entry point"])
@pytest.mark.parametrize("architecture", OUTSIDE)
@pytest.mark.usefixtures("no_registered_models")
def test_the_models_of_the_page_equal_hugging_face(
    architecture: str, way: str, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model from outside this package: logits 1e-4 apart at most, equal greedy tokens."""
    folder = save_random(package / "model", architecture, **OUTSIDE[architecture])
    with pytest.raises(ValueError, match=f"{architecture}.*adding-a-model"):
        run(folder)
    if way == "register_model":
        __import__("my_models")
    else:
        module = package / "my_models.py"
        module.write_text(re.sub(r"^register_model.*$", "", module.read_text(), flags=re.MULTILINE))
        name = {"HeliumForCausalLM": "HELIUM", "NemotronForCausalLM": "NEMOTRON"}[architecture]
        info = package / "my_models-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-models\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[nanovllm.models]\n{architecture} = my_models:{name}\n")
    prompt, tokens, logits = run(folder, max_num_batched_tokens=16)
    hugging_face = load_hugging_face(folder)
    assert tokens == hugging_face_greedy(hugging_face, prompt, 12)
    torch.testing.assert_close(logits, hugging_face_logits(hugging_face, (prompt + tokens)[:-1]), atol=1e-4, rtol=0)


@pytest.mark.usefixtures("no_registered_models")
def test_names_are_taken_once() -> None:
    row = Architecture(switches={"qk_norm": "head"})
    register_model("MineForCausalLM", row)
    register_model("MineForCausalLM", row)  # as when its module is imported again
    for name in ("MineForCausalLM", "LlamaForCausalLM"):
        with pytest.raises(ValueError, match=f"'{name}' is registered already"):
            register_model(name, Architecture())
    with pytest.raises(TypeError, match="'OursForCausalLM' must be"):
        register_model("OursForCausalLM", "module:class")  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", registry.ARCHITECTURES)
def test_every_architecture_names_the_test_that_proves_it(
    architecture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = registry.ARCHITECTURES[architecture]
    assert f'"{architecture}"' in (ROOT / row.proof).read_text()
    assert main(["models"]) == 0
    assert re.search(rf"^{architecture} +{re.escape(row.serves)} +{row.proof}$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("architecture", [name for name in registry.ARCHITECTURES if name.endswith("ForCausalLM")])
def test_a_field_that_no_row_knows_is_refused_by_name(tmp_path: Path, architecture: str) -> None:
    """Rather than a model that is not quite the checkpoint's; null says that a feature is not there."""
    folder = save_random(tmp_path, architecture)
    edit_json(folder / "config.json", attention_chunk_size=None, output_attentions=False)
    with LLM(str(folder), device="cpu", skip_tokenizer_init=True, load_format="dummy"):
        pass
    for name, value in (("attention_chunk_size", 64), ("a_field_of_next_year", 64)):
        edit_json(folder / "config.json", **{"attention_chunk_size": None, name: value})
        with pytest.raises(ValueError, match=f"{architecture}: {name}="):
            LLM(str(folder), device="cpu", skip_tokenizer_init=True)
