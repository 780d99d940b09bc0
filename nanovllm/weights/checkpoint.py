"""open_checkpoint: from a model's name to its config and a stream of named tensors.

Owns the choice of the weight files and their formats. Does not own what a tensor means or where it goes (the loader),
nor GGUF (`weights/gguf.py`). Invariant: every weight file is complete when a checkpoint has been opened, so a damaged
one is refused before memory is taken; tensors are memory-mapped and come one by one.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from nanovllm.config import NamedModule
from nanovllm.model_files.locate import locate_model, only_gguf_file
from nanovllm.weights.prediction_heads import is_of_prediction_head, warn_of_prediction_heads
from nanovllm.weights.wrapped import text_config, text_name, warn_of_other_parts

_SINGLE_NAME = "model.safetensors"
_INDEX_NAME = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


Places = Mapping[str, torch.Tensor]
NOWHERE: Places = MappingProxyType({})


class Checkpoint(Protocol):
    """A model on disk. config, generation_config: as Hugging Face's JSON files ({} where there is no file)."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]

    def tensors(self, dtype: torch.dtype, places: Places = NOWHERE) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (Hugging Face name, CPU tensor), each name once. Never write to one: it may be the file itself.

        dtype: of numbers that have to be computed first; others come as they are stored. places: by name, memory for
        such numbers; a tensor of its shape and dtype is computed there.
        """

    def headers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what `tensors` does as tensors of the meta device: names, shapes and dtypes, and nothing is read."""


def open_checkpoint(model: str, *, load_format: str, revision: str | None, is_packed: bool = False) -> Checkpoint:
    """Open a folder, a .gguf file, a Hugging Face Hub name, "demo", or a model in this process.

    load_format: "auto" takes safetensors where there are some, else GGUF; "safetensors" and "gguf" insist; "dummy"
    needs the config only. revision: of a Hub name. is_packed: matrices of a GGUF file come in the bits they have there.
    Raises ValueError or NotImplementedError that names the file at fault, ConnectionError if a download fails.
    """
    if isinstance(model, NamedModule):
        from nanovllm.weights.module import ModuleCheckpoint  # a leaf: most models are files

        return ModuleCheckpoint(model)
    # The Hub's GGUF files are alternatives of which a user wants one: they are not fetched, only refused below.
    path = locate_model(model, revision, with_weights=load_format in ("auto", "safetensors"))
    if path.is_file():
        if load_format == "safetensors":
            raise ValueError(f"load_format='safetensors', but {path} is a GGUF file: use load_format='auto'")
        return _open_gguf(path, is_packed)
    has_safetensors = any(path.glob("*.safetensors"))
    if load_format == "gguf" or (load_format != "safetensors" and not has_safetensors and any(path.glob("*.gguf"))):
        return _open_gguf(only_gguf_file(path), is_packed)
    if is_packed:
        raise ValueError(f"quantization='gguf' is for GGUF files, and safetensors are read from {path}: leave it out")
    return SafetensorsCheckpoint(path, [] if load_format == "dummy" else _weight_files(path))


def _open_gguf(path: Path, is_packed: bool) -> Checkpoint:
    # A leaf: only GGUF files need the gguf package.
    from nanovllm.weights.gguf import GGUFCheckpoint

    return GGUFCheckpoint(path, is_packed)


class SafetensorsCheckpoint:
    """A folder with config.json and safetensors files, of which `files` are read."""

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path = path
        config = _read_json(path / "config.json", required=True)
        if not config.get("quantization_config"):
            config |= _read_quantization_beside(path / "hf_quant_config.json")
        self.config = text_config(config, path)
        self.generation_config = _read_json(path / "generation_config.json", required=False)
        self._files = files
        self._has_other_parts = "text_config" in config
        names = _read_tensor_names(path, files)
        if self._has_other_parts:
            warn_of_other_parts(names, path)
        self.num_of_prediction_head = sum(is_of_prediction_head(name, self.config) for name in names)
        warn_of_prediction_heads(self.num_of_prediction_head, path)

    def tensors(self, dtype: torch.dtype, places: Places = NOWHERE) -> Iterator[tuple[str, torch.Tensor]]:
        return self._tensors(of_prediction_head=False)

    def prediction_head(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As `tensors`: those that it leaves out."""
        return self._tensors(of_prediction_head=True)

    def _tensors(self, of_prediction_head: bool) -> Iterator[tuple[str, torch.Tensor]]:
        for file in self._files:
            with safe_open(file, framework="pt") as tensors:
                for stored_name in tensors.keys():  # noqa: SIM118 (not a dict)
                    name = text_name(stored_name) if self._has_other_parts else stored_name
                    if name is not None and is_of_prediction_head(name, self.config) == of_prediction_head:
                        yield name, tensors.get_tensor(stored_name)

    def headers(self) -> Iterator[tuple[str, torch.Tensor]]:
        # A mapped tensor takes no memory before somebody looks at its numbers.
        return ((name, tensor.to("meta")) for name, tensor in self.tensors(torch.float32))


def _read_quantization_beside(path: Path) -> dict[str, Any]:
    """`quantization_config` as ModelOpt's older exports say it, in a file of its own; empty without one."""
    stated = _read_json(path, required=False)
    if not stated:
        return {}
    if not isinstance(stated.get("quantization"), dict):
        raise ValueError(f"{path}: quantization must be an object, got {stated.get('quantization')!r}")
    return {"quantization_config": {"quant_method": "modelopt", **stated["quantization"]}}


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, checked for completeness by the index or by their numbering.

    In transformers' order: one file with all, beside which an index or shards are of an earlier save, then an index.
    """
    if (folder / _SINGLE_NAME).is_file():
        return [folder / _SINGLE_NAME]
    if (folder / _INDEX_NAME).exists():
        index = _read_json(folder / _INDEX_NAME, required=True)
        if not isinstance(index.get("weight_map"), dict):
            raise ValueError(f"{folder / _INDEX_NAME} has no weight_map")
        for tensor, name in index["weight_map"].items():
            # By its name alone: in the Hub's cache, files are links that lead out of the folder.
            if not isinstance(name, str) or not name.endswith(".safetensors") or not _is_below(name):
                raise ValueError(
                    f"{folder / _INDEX_NAME}: weight_map puts {tensor} into {name!r}, no file of its folder"
                )
        names = sorted(set(index["weight_map"].values()))
        for name in names:
            if not (folder / name).is_file():
                raise ValueError(f"{folder / _INDEX_NAME} names {name}, which is missing: fetch the model again")
        return [folder / name for name in names]
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated"))
    if not files:
        raise ValueError(_no_weights_message(folder))
    for file in files:
        if shard := _SHARD_NAME.fullmatch(file.name):
            stem, _, count = shard.groups()
            for number in range(1, int(count) + 1):
                if not (name := folder / f"{stem}-{number:05}-of-{count}.safetensors").exists():
                    raise ValueError(f"{name} is missing beside {file.name}: fetch the model again")
    return files


def _is_below(name: str) -> bool:
    path = PurePath(name)
    return not path.is_absolute() and ".." not in path.parts


def _no_weights_message(folder: Path) -> str:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if pickles:
        return (
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when loaded and are not read: "
            "convert them where you trust them, with transformers' `AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(...)`, which writes safetensors"
        )
    return f"{folder} holds no weight file: expected model.safetensors, {_INDEX_NAME} with its shards, or a .gguf file"


def _read_tensor_names(folder: Path, files: list[Path]) -> Iterable[str]:
    """Open every file once, and return all names. Raises ValueError for a damaged one, or a tensor held twice."""
    home: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names = list(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or damaged ({error}): fetch it again") from error
        for name in names:
            if name in home:
                raise ValueError(f"tensor {name} is in both {home[name]} and {file.name} of {folder}")
            home[name] = file.name
    return home


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise ValueError(f"{path} is missing: a model folder needs {path.name}") from None
        return {}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of 5,000 digits, brackets without end
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
