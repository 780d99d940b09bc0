import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nanovllm.model_files import locate
from nanovllm.weights.checkpoint import Checkpoint, open_checkpoint
from nanovllm.weights.gguf import GGUFCheckpoint
from tests.gguf_files import metadata, tiny_tensors, write_gguf

INDEX = "model.safetensors.index.json"


def _open(path: Path, load_format: str = "auto") -> Checkpoint:
    return open_checkpoint(str(path), load_format=load_format, revision=None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


@pytest.fixture
def sharded(folder: Path) -> Path:
    shards = {f"model-0000{n}-of-00002.safetensors": {f"t{n}": torch.full((2, 3), float(n))} for n in (1, 2)}
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_single_file(folder: Path) -> None:
    save_file({"a": torch.arange(6.0).reshape(2, 3)}, folder / "model.safetensors")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    checkpoint = _open(folder)
    assert checkpoint.path == folder
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.generation_config == {"eos_token_id": [1, 2]}
    ((name, tensor),) = checkpoint.tensors(torch.float32)
    assert name == "a" and torch.equal(tensor, torch.arange(6.0).reshape(2, 3))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tensors_are_the_mapped_file_itself(folder: Path) -> None:
    save_file({"a": torch.zeros(1000), "b": torch.ones(3)}, folder / "model.safetensors")
    for _, tensor in _open(folder).tensors(torch.float32):
        mapped = [
            range(*(int(address, 16) for address in line.split()[0].split("-")))
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(str(folder / "model.safetensors"))
        ]
        assert any(tensor.data_ptr() in addresses for addresses in mapped)


@pytest.mark.parametrize("has_index", [True, False])
def test_shards(sharded: Path, has_index: bool) -> None:
    if not has_index:
        (sharded / INDEX).unlink()
    tensors = dict(_open(sharded).tensors(torch.float32))
    assert {name: tensor.unique().tolist() for name, tensor in tensors.items()} == {"t1": [1.0], "t2": [2.0]}


@pytest.mark.parametrize("has_index", [True, False])
def test_missing_shard_is_named(sharded: Path, has_index: bool) -> None:
    if not has_index:
        (sharded / INDEX).unlink()
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors.*missing"):
        _open(sharded)


@pytest.mark.parametrize("has_shards", [True, False])
def test_one_file_wins_over_what_an_earlier_save_left(sharded: Path, has_shards: bool) -> None:
    save_file({"t1": torch.full((2, 3), 9.0)}, sharded / "model.safetensors")
    for shard in sharded.glob("model-*"):
        shard.unlink() if not has_shards else None
    tensors = dict(_open(sharded).tensors(torch.float32))
    assert {name: tensor.unique().tolist() for name, tensor in tensors.items()} == {"t1": [9.0]}


def test_index_that_disagrees_with_its_shards(sharded: Path) -> None:
    """It says which files to read; what they hold, they say themselves. No tensor may be held twice."""
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] |= {"t3": "model-00001-of-00002.safetensors", "t2": "model-00001-of-00002.safetensors"}
    index["weight_map"]["t1"] = "model-00002-of-00002.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    assert set(dict(_open(sharded).tensors(torch.float32))) == {"t1", "t2"}
    save_file({"t1": torch.zeros(1)}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="tensor t1 is in both"):
        _open(sharded)


@pytest.mark.parametrize(
    "outside", ["../secret.safetensors", "/etc/x.safetensors", "a/../../b.safetensors", "x.bin", 3]
)
def test_index_that_leads_out_of_its_folder_is_refused_before_a_file_is_opened(folder: Path, outside: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"t1": outside}}))
    with pytest.raises(ValueError, match=r"index\.json: weight_map puts t1 into"):
        _open(folder)


def test_headers_are_what_tensors_gives_without_the_numbers(sharded: Path) -> None:
    headers = dict(_open(sharded).headers())
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in headers.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in _open(sharded).tensors(torch.float32)
    }
    assert all(tensor.is_meta for tensor in headers.values())


def test_truncated_file_is_named(sharded: Path) -> None:
    path = sharded / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is truncated or damaged"):
        _open(sharded)


def test_no_weight_file(folder: Path) -> None:
    with pytest.raises(ValueError, match="holds no weight file"):
        _open(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model\.bin\).*save_pretrained"):
        _open(folder)


def test_broken_config(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        _open(tmp_path)
    nested, digits = "[" * 100_000, "1" * 5000
    for text, complaint in (
        *(("{", "not valid JSON"), ("[]", "JSON object"), (nested, "not valid JSON"), (digits, "not valid JSON")),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"config\.json.*{complaint}"):
            _open(tmp_path)


def test_dummy_reads_the_config_only(folder: Path) -> None:
    checkpoint = _open(folder, "dummy")
    assert checkpoint.config == {"model_type": "llama"}
    assert list(checkpoint.tensors(torch.float32)) == []


def test_formats(folder: Path) -> None:
    """A folder with both formats gives safetensors unless GGUF is asked for; a wrong wish is an error."""
    gguf_path = write_gguf(folder / "m.gguf", "llama", metadata("llama"), tiny_tensors())
    assert isinstance(_open(folder), GGUFCheckpoint)
    assert isinstance(_open(gguf_path), GGUFCheckpoint)
    with pytest.raises(ValueError, match="holds no weight file"):
        _open(folder, "safetensors")
    with pytest.raises(ValueError, match=r"m\.gguf is a GGUF file"):
        _open(gguf_path, "safetensors")
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    assert [name for name, _ in _open(folder).tensors(torch.float32)] == ["a"]
    assert isinstance(_open(folder, "gguf"), GGUFCheckpoint)
    write_gguf(folder / "n.gguf", "llama", metadata("llama"), tiny_tensors())
    with pytest.raises(ValueError, match=r"several GGUF files \(m\.gguf, n\.gguf\)"):
        _open(folder, "gguf")


@pytest.mark.parametrize(
    "load_format, fetched", [("auto", True), ("safetensors", True), ("dummy", False), ("gguf", False)]
)
def test_hub_weights_are_fetched_only_if_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_format: str, fetched: bool
) -> None:
    def fetch(name: str, revision: str | None, patterns: list[str]) -> Path:
        assert (name, revision) == ("who/what", "v1")
        assert ("*.safetensors" in patterns) == fetched
        return tmp_path

    monkeypatch.setattr(locate, "_fetch_from_hub", fetch)
    with pytest.raises(ValueError, match=str(tmp_path)):
        open_checkpoint("who/what", load_format=load_format, revision="v1")
