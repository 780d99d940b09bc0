import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nanovllm.tokenizer
from nanovllm.detokenizer import DetokenizerStream
from nanovllm.model_files.tokenizer_files import load_tokenizer
from nanovllm.tokenizer import Tokenizer
from tests.gguf_files import byte_level_keys, sentencepiece_keys, write_gguf

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}12{% endif %}"
)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    keys = byte_level_keys(add_bos_token=True) | {"tokenizer.chat_template": TEMPLATE}
    return load_tokenizer(str(write_gguf(tmp_path_factory.mktemp("b") / "b.gguf", "llama", keys, {})), revision=None)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = write_gguf(tmp_path_factory.mktemp("s") / "s.gguf", "llama", sentencepiece_keys(), {})
    return load_tokenizer(str(path), revision=None)


def test_a_tokenizer_is_loaded_by_the_module_that_has_its_class(tmp_path: Path) -> None:
    """Who has a Tokenizer in hand looks for its maker there, too."""
    path = str(write_gguf(tmp_path / "b.gguf", "llama", byte_level_keys(), {}))
    there, here = (load(path, revision=None) for load in (load_tokenizer, nanovllm.tokenizer.load_tokenizer))
    assert here.encode("hello world") == there.encode("hello world")


def _stream(tokenizer: Tokenizer, token_ids: list[int], skip_special_tokens: bool) -> list[str]:
    stream = DetokenizerStream(tokenizer, skip_special_tokens)
    return [*(stream.step(token_id) for token_id in token_ids), stream.flush()]


@settings(deadline=None, max_examples=300)
@given(token_ids=st.lists(st.integers(0, 270), max_size=40), skip=st.booleans())
def test_byte_level_stream_adds_up_to_decode_of_anything(
    byte_level: Tokenizer, token_ids: list[int], skip: bool
) -> None:
    """Also of byte salad, special tokens inside characters, and ids beyond the vocabulary (265 tokens)."""
    assert "".join(_stream(byte_level, token_ids, skip)) == byte_level.decode(token_ids, skip_special_tokens=skip)


@settings(deadline=None, max_examples=300)
@given(text=st.text(), skip=st.booleans())
def test_streams_of_text_never_split_a_character(
    byte_level: Tokenizer, sentencepiece: Tokenizer, text: str, skip: bool
) -> None:
    for tokenizer in (byte_level, sentencepiece):
        token_ids = tokenizer.encode(text)
        pieces = _stream(tokenizer, token_ids, skip)
        assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=skip)
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
        if skip:
            assert "".join(pieces) == text


@settings(deadline=None, max_examples=200)
@given(token_ids=st.lists(st.sampled_from([0, 1, 2, *range(259, 268)]), max_size=20), skip=st.booleans())
def test_sentencepiece_stream_keeps_spaces(sentencepiece: Tokenizer, token_ids: list[int], skip: bool) -> None:
    pieces = _stream(sentencepiece, token_ids, skip)
    assert "".join(pieces) == sentencepiece.decode(token_ids, skip_special_tokens=skip)


def test_a_character_comes_with_its_last_byte(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("€a")[1:]
    assert _stream(byte_level, token_ids, True) == ["", "", "€", "a", ""]
    assert _stream(byte_level, token_ids[:2], True) == ["", "", "\ufffd"]


def test_one_bos(byte_level: Tokenizer) -> None:
    assert byte_level.encode("a") == [262, *byte_level.encode("a")[1:]]
    assert byte_level.encode("<bos>a") == byte_level.encode("a")
    chat = byte_level.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=False)
    assert chat == byte_level.encode("a")
    rendered = byte_level.hf.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert byte_level.encode(rendered) == byte_level.encode("a")


def test_bos_is_kept_where_none_is_added(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_gguf(tmp_path / "b.gguf", "llama", byte_level_keys(), {})), revision=None)
    assert tokenizer.encode("<bos><bos>") == [262, 262]


def test_chat_template(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    messages = [{"role": "user", "content": "a"}]
    assert byte_level.decode(byte_level.apply_chat_template(messages)) == "a12"
    with pytest.raises(ValueError, match=r"no chat template: use generate\(\)"):
        sentencepiece.apply_chat_template(messages)
    assert sentencepiece.decode(sentencepiece.apply_chat_template(messages, chat_template="abc")) == "abc"


def test_text_holds_no_special_token(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("a<think>b<eos>")
    assert byte_level.decode(token_ids) == "a<think>b"
    assert byte_level.decode(token_ids, skip_special_tokens=False) == "<bos>a<think>b<eos>"


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_a_folder_gives_the_same_tokenizer(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """What transformers saves and loads again, and what its object says, agree with the one from GGUF."""
    original: Tokenizer = request.getfixturevalue(name)
    original.hf.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), revision=None)
    assert (loaded.eos_token_id, loaded.bos_token_id) == (original.eos_token_id, original.bos_token_id)
    assert original.eos_token_id == original.hf.eos_token_id
    assert len(loaded) == len(original) == len(original.hf)
    for text in ("", "hello world", "abc é€ 12  \n", "a<eos>b</s>"):
        assert loaded.encode(text) == original.encode(text) == original.hf(text).input_ids
        assert loaded.decode(loaded.encode(text)) == original.decode(original.encode(text))


def test_without_a_rust_tokenizer(byte_level: Tokenizer) -> None:
    """The few tokenizers that transformers has in Python only go through its own methods."""
    hf = byte_level.hf
    slow = Tokenizer(lambda: hf, None, eos_token_id=hf.eos_token_id, bos_token_id=hf.bos_token_id)
    text = "hello € wörld<eos>"
    token_ids = slow.encode(text)
    assert token_ids == byte_level.encode(text)
    assert slow.decode(token_ids) == "".join(_stream(slow, token_ids, True)) == byte_level.decode(token_ids)
    assert len(slow) == len(byte_level)


def test_a_tokenizer_that_truncates_does_not_here(byte_level: Tokenizer, tmp_path: Path) -> None:
    byte_level.hf.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = "a long prompt that must not be cut"
    assert load_tokenizer(str(tmp_path), revision=None).encode(text) == byte_level.encode(text)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no tokenizer.*tokenizer=.*skip_tokenizer_init"):
        load_tokenizer(str(tmp_path), revision=None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=f"the tokenizer in {tmp_path} cannot be loaded"):
        load_tokenizer(str(tmp_path), revision=None)


def test_importing_is_light() -> None:
    """No torch and no transformers before something needs them."""
    code = "import sys, nanovllm.tokenizer; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
