import warnings
from pathlib import Path
from typing import Any

import pytest

from nanovllm.model_files.gguf_cuts import CUTS
from nanovllm.model_files.gguf_tokenizer import build_gguf_tokenizer
from tests.gguf_files import byte_level_keys, sentencepiece_keys, write_gguf


def _build(tmp_path: Path, keys: dict[str, Any]) -> Any:
    return build_gguf_tokenizer(write_gguf(tmp_path / "t.gguf", "llama", keys, {}))


def test_byte_level_merges_and_special_tokens(tmp_path: Path) -> None:
    tokenizer, special = _build(tmp_path, byte_level_keys() | {"tokenizer.chat_template": "T"})
    assert tokenizer.encode("hello world").tokens == ["hello", "Ġw", "o", "r", "l", "d"]
    assert tokenizer.encode("a<eos>b<think>").tokens == ["a", "<eos>", "b", "<think>"]
    assert tokenizer.decode(tokenizer.encode("a<eos>b<think>").ids) == "ab<think>"
    assert special == {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>", "chat_template": "T"}


@pytest.mark.parametrize(
    "pre, text, tokens",
    [
        ("gpt-2", "12  3", ["12", "Ġ", "Ġ", "3"]),
        ("smollm", "12  3", ["1", "2", "Ġ", "Ġ", "3"]),
        ("qwen2", "12  3", ["1", "2", "Ġ", "Ġ", "3"]),
        ("qwen2", "e\u0301", ["Ã", "©"]),  # NFC
        ("gpt-2", "e\u0301", ["e", "Ì", "ģ"]),
        ("llama-bpe", "12  3", ["<bos>", "12", "Ġ", "Ġ", "3"]),
        ("tekken", "12  3", ["<bos>", "1", "2", "Ġ", "Ġ", "3"]),
        ("smaug-bpe", "12  3", ["12", "Ġ", "Ġ", "3"]),
        ("deepseek-coder", "12\n3", ["1", "2", "Ċ", "3"]),
        ("deepseek-llm", "12 hello", ["12", "Ġ", "hello"]),
        ("falcon3", "12", ["<bos>", "12"]),
        ("superbpe", "0124", ["0", "12", "4"]),
        ("tiny_aya", "hello'll 0120", ["hello", "'", "ll", "Ġ", "0", "12", "0"]),
        ("gpt-4o", "hello'll12", ["hello", "'", "ll", "12"]),
        ("kimi-k2", "中hello'll12", ["ä", "\u00b8", "Ń", "hello", "'", "ll", "12"]),
    ],
)
def test_cuts(tmp_path: Path, pre: str, text: str, tokens: list[str]) -> None:
    tokenizer, _ = _build(tmp_path, byte_level_keys(pre))
    assert tokenizer.encode(text).tokens == tokens


def test_gemma4_merges_pieces(tmp_path: Path) -> None:
    """By a list, whatever their scores are; text begins with BOS also where a file says that it does not."""
    merges = {"merges": ["a b", "▁ ab"], "model": "gemma4", "add_space_prefix": False, "add_bos_token": False}
    tokenizer, _ = _build(tmp_path, {**sentencepiece_keys(**merges), "tokenizer.ggml.bos_token_id": 1})
    assert tokenizer.encode("abc abé").tokens == ["<s>", "ab", "c", "▁ab", "é"]
    assert tokenizer.encode("ñ").tokens == ["<s>", "<0xC3>", "<0xB1>"]
    for text in ("abc abé", " a  ñ\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("pre", [*CUTS])
def test_every_cut_keeps_the_text(tmp_path: Path, pre: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer, _ = _build(tmp_path, byte_level_keys(pre))
    for text in (
        "Hello  wörld's 1234567 tests!\n\n\t日本語テキスト, नमस्ते مرحبا",
        " x\r\n  y ",
        "ÀÉ DŽ ﬁ 🦙🦙",
        "def f(x):\n    return x**2\n",
    ):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_file_that_does_not_name_its_cut(tmp_path: Path) -> None:
    """It is read as llama.cpp reads it, and says so; Qwen's cut follows from the architecture."""
    with pytest.warns(UserWarning, match=r"t\.gguf does not say how .* give its tokenizer with tokenizer="):
        tokenizer, _ = _build(tmp_path, byte_level_keys(None))  # type: ignore[arg-type]
    assert tokenizer.encode("1234 a").tokens == ["12", "3", "4", "Ġ", "a"]
    keys = byte_level_keys(None)  # type: ignore[arg-type]
    tokenizer, _ = build_gguf_tokenizer(write_gguf(tmp_path / "q.gguf", "qwen2", keys, {}))
    assert tokenizer.encode("12 e\u0301").tokens == ["1", "2", "Ġ", "Ã", "©"]


@pytest.mark.parametrize("kind, extra", [(3, {"unknown_token_id": 0}), (2, {}), (3, {}), (1, {"unknown_token_id": 0})])
def test_the_unknown_token_may_be_of_any_type(tmp_path: Path, kind: int, extra: dict[str, int]) -> None:
    keys = sentencepiece_keys(**extra)
    keys["tokenizer.ggml.token_type"][0] = kind
    tokenizer, _ = _build(tmp_path, keys)
    assert tokenizer.encode("abc").tokens == ["<s>", "▁abc"]


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_metadata_decide_about_bos_and_eos(tmp_path: Path, pre: str, adds_bos: bool) -> None:
    tokenizer, _ = _build(tmp_path, byte_level_keys(pre, add_bos_token=adds_bos, add_eos_token=True))
    assert tokenizer.encode("a").tokens == ["<bos>"] * adds_bos + ["a", "<eos>"]


def test_sentencepiece(tmp_path: Path) -> None:
    tokenizer, special = _build(tmp_path, sentencepiece_keys())
    assert tokenizer.encode("abc ab").tokens == ["<s>", "▁abc", "▁ab"]
    assert tokenizer.encode("é€").tokens == ["<s>", "▁", "é", "<0xE2>", "<0x82>", "<0xAC>"]
    assert tokenizer.decode(tokenizer.encode("abc é€ ab").ids) == "abc é€ ab"
    assert special == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer, _ = _build(tmp_path, sentencepiece_keys(add_space_prefix=False))
    assert tokenizer.encode("abc").tokens == ["<s>", "abc"]


def test_runs_of_spaces_that_are_tokens_by_themselves(tmp_path: Path) -> None:
    """Gemma's vocabulary has them as user-defined tokens, with U+2581 or (newer converters) with spaces."""
    for run in ("▁▁▁", "   "):
        keys = sentencepiece_keys(add_space_prefix=False)
        keys["tokenizer.ggml.tokens"] += ["▁▁", run, "\n\n"]
        keys["tokenizer.ggml.scores"] += [0.0] * 3
        keys["tokenizer.ggml.token_type"] += [4] * 3
        tokenizer, _ = _build(tmp_path, keys)
        text = "a   ab  b\n\nc abc"
        encoding = tokenizer.encode(text)
        assert encoding.tokens == ["<s>", "a", "   ", "ab", "  ", "b", "\n\n", "c", "▁abc"]
        assert max(encoding.ids) < len(keys["tokenizer.ggml.tokens"])
        assert tokenizer.decode(encoding.ids) == text


def test_unknown_kinds_are_refused_by_name(tmp_path: Path) -> None:
    """Nothing that is only similar is used."""
    for keys, name in (
        (byte_level_keys("falcon"), "'falcon'"),
        (byte_level_keys(model="rwkv"), "'rwkv'"),
    ):
        with pytest.raises(NotImplementedError, match=f"{name}.*tokenizer="):
            _build(tmp_path, keys)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        _build(tmp_path, {})
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.scores"):
        _build(tmp_path, sentencepiece_keys(scores=None))
