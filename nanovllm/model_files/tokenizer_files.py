"""load_tokenizer: from a model's name to its `Tokenizer`.

Owns which of its files make the tokenizer, and what is missing where none does. Invariant: no code of a model is run.
transformers is imported for folders alone: importing it takes longer than building a tokenizer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from nanovllm.model_files.locate import locate_model, only_gguf_file
from nanovllm.tokenizer import Tokenizer

_SENTENCEPIECE_FILE, _TEKKEN_FILE = "tokenizer.model", "tekken.json"
_HF_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
_TOKENIZER_FILES = (*_HF_FILES, _SENTENCEPIECE_FILE, _TEKKEN_FILE)
# What transformers needs to read some files, by the file.
_REMEDIES = {
    _TEKKEN_FILE: "tekken.json needs mistral-common: pip install 'nanovllm[mistral]'",
    _SENTENCEPIECE_FILE: (
        "tokenizer.model beside other files needs sentencepiece and protobuf: pip install sentencepiece protobuf; or "
        "add the model's tokenizer.json"
    ),
}


def load_tokenizer(model: str, *, revision: str | None) -> Tokenizer:
    """Load the tokenizer of a folder, a .gguf file, a Hugging Face Hub name (only small files are fetched), or "demo".

    Raises ValueError or NotImplementedError that says what is missing or unknown, ConnectionError if a download fails.
    """
    path = locate_model(model, revision, with_weights=False)
    if path.is_dir() and not any((path / name).exists() for name in _TOKENIZER_FILES):
        if not any(path.glob("*.gguf")):
            raise ValueError(
                f"{path} holds no tokenizer (tokenizer.json or the like): add its files, name another folder with "
                "tokenizer=, or set skip_tokenizer_init=True to work on token ids"
            )
        path = only_gguf_file(path)
    if path.is_file():
        # A leaf: only GGUF files need the gguf package.
        from nanovllm.model_files.gguf_tokenizer import build_gguf_tokenizer

        return _from_backend(*build_gguf_tokenizer(path))
    present = [name for name in _TOKENIZER_FILES if (path / name).exists()]
    if present == [_SENTENCEPIECE_FILE]:
        from nanovllm.model_files.gguf_tokenizer import build_tokenizer
        from nanovllm.model_files.sentencepiece_file import read_sentencepiece

        file = path / _SENTENCEPIECE_FILE
        return _from_backend(*build_tokenizer(file, read_sentencepiece(file)))
    return _from_folder(path, present)


def _from_backend(backend: tokenizers.Tokenizer, special: Mapping[str, str]) -> Tokenizer:
    """special: what transformers' wrapper is told beside it."""

    def wrap() -> Any:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)

    eos_token_id, bos_token_id = (
        backend.token_to_id(special[name]) if name in special else None for name in ("eos_token", "bos_token")
    )
    return Tokenizer(wrap, backend, eos_token_id=eos_token_id, bos_token_id=bos_token_id)


def _from_folder(path: Path, present: Sequence[str]) -> Tokenizer:
    """present: which of _TOKENIZER_FILES are there."""
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        remedies = (
            "" if "tokenizer.json" in present else "; ".join(_REMEDIES[name] for name in present if name in _REMEDIES)
        )
        raise ValueError(
            f"the tokenizer in {path} cannot be loaded{f' ({remedies})' if remedies else ''}: {error}"
        ) from error
    backend = getattr(hf, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return Tokenizer(lambda: hf, backend, eos_token_id=hf.eos_token_id, bos_token_id=hf.bos_token_id)
