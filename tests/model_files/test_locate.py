from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from nanovllm.model_files.locate import locate_model, only_gguf_file


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").touch()
    monkeypatch.chdir(tmp_path.parent)
    assert locate_model(str(tmp_path), None, with_weights=True) == tmp_path
    assert locate_model(f"{tmp_path.name}/m.gguf", None, with_weights=True) == Path(tmp_path.name, "m.gguf")


@pytest.mark.parametrize("model", ["/none", "./none", "~/none/x", "none.gguf", "a/b.gguf", "none", "a/b/c", "a b/c"])
def test_a_wrong_name_is_an_error_with_remedies(model: str) -> None:
    with pytest.raises(ValueError, match=r"folder with config\.json.*\.gguf file.*Hub name.*'demo'"):
        locate_model(model, None, with_weights=True)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ValueError, match=r"model\.bin' is a file but not a \.gguf"):
        locate_model(str(tmp_path / "model.bin"), None, with_weights=True)


@pytest.mark.parametrize("with_weights", [True, False])
def test_hub_fetches_no_code_and_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_weights: bool) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert locate_model("who/what", "v1", with_weights=with_weights) == tmp_path
    files = [
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "modeling_x.py",
        "pytorch_model.bin",
        "a/config.json",
    ]
    fetched = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(fetched) == ["config.json", *["model.safetensors"] * with_weights, "tokenizer.model"]
    assert (asked["name"], asked["revision"]) == ("who/what", "v1")


def test_hub_out_of_reach_names_the_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        ConnectionError, match=r"who/what.*offline.*hf download who/what --local-dir.*\.gguf file.*'demo'"
    ):
        locate_model("who/what", None, with_weights=True)


def test_only_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no GGUF file"):
        only_gguf_file(tmp_path)
    (tmp_path / "a.gguf").touch()
    assert only_gguf_file(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ValueError, match=r"several GGUF files \(a\.gguf, b\.gguf\)"):
        only_gguf_file(tmp_path)
