import json
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


def test_only_gguf_file_of_a_quantization_or_a_split_model(tmp_path: Path) -> None:
    names = ["m-Q4_K_M.gguf", "m-Q4_K.gguf", "m-iq4_xs.gguf", "mmproj-m-Q8_0.gguf"]
    names += [f"Q8_0/m-Q8_0-0000{number}-of-00002.gguf" for number in (1, 2)]
    (tmp_path / "Q8_0").mkdir()
    for name in names:
        (tmp_path / name).touch()
    for quantization, name in (("Q4_K", names[1]), ("q4_k_m", names[0]), ("IQ4_XS", names[2]), ("Q8_0", names[4])):
        assert only_gguf_file(tmp_path, quantization) == tmp_path / name
        assert locate_model(f"{tmp_path}:{quantization}", None, with_weights=True) == tmp_path / name
    assert only_gguf_file(tmp_path / "Q8_0") == tmp_path / names[4]
    with pytest.raises(ValueError, match=r"no GGUF file of Q5_0: .*'folder:Q4_K_M'"):
        locate_model(f"{tmp_path}:Q5_0", None, with_weights=True)


def test_a_quantization_of_a_hub_name_fetches_its_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m.q4_k_m.gguf", "Q4_K_M/m-Q4_K_M-00001-of-00002.gguf", "m-IQ4_K_M.gguf"]
    fetched: list[str] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str], **_: Any) -> str:
        assert name == "who/what-GGUF"
        fetched[:] = huggingface_hub.utils.filter_repo_objects(
            there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        (tmp_path / "m-Q4_K_M.gguf").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert locate_model("who/what-GGUF:Q4_K_M", None, with_weights=False) == tmp_path / "m-Q4_K_M.gguf"
    assert fetched == [there[0], there[2], there[3]]


def test_blobs_of_ollama_and_the_manifests_that_name_them(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "sha256-aa"
    manifest = tmp_path / "manifests" / "host" / "library" / "llama3.2" / "1b"
    for path in (blob, manifest):
        path.parent.mkdir(parents=True)
    blob.write_bytes(b"GGUF....")
    layers = [{"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:bb"}]
    layers += [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:aa"}]
    manifest.write_text(json.dumps({"layers": layers}))
    assert locate_model(str(blob), None, with_weights=True) == blob
    assert locate_model(str(manifest), None, with_weights=True) == blob
    for digest in ("sha256:cc", "../../etc/x", 3):
        manifest.write_text(json.dumps({"layers": [{**layers[1], "digest": digest}]}))
        with pytest.raises(ValueError, match="names the blob"):
            locate_model(str(manifest), None, with_weights=True)
    for text in ("{", '{"layers": 3}', '{"layers": []}'):
        manifest.write_text(text)
        with pytest.raises(ValueError, match="not a manifest of Ollama's"):
            locate_model(str(manifest), None, with_weights=True)


def test_chat_templates_of_a_hub_name_come_from_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = [
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "onnx/config.json",
        "onnx/tokenizer.model",
    ]

    def snapshot_download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str], **_: Any) -> str:
        fetched = huggingface_hub.utils.filter_repo_objects(
            there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        assert list(fetched) == there[:2]
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    locate_model("who/what", None, with_weights=True)
