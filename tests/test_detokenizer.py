"""Streams of every kind of tokenizer, on tokens that no encoder would write: cut anywhere, special, added, no UTF-8."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from nanovllm.detokenizer import DetokenizerStream
from nanovllm.model_files.tokenizer_files import load_tokenizer
from nanovllm.tokenizer import Tokenizer
from tests.tiny_models import save_tokenizer

WORDS = ["▁Hello", "▁world", "▁", "▁▁", "a", "é", "你", "<0x", "##b", "ab.", "true", "▁true"]


def byte_fallback(first: list[str], *steps: decoders.Decoder) -> Tokenizer:
    """SentencePiece's scheme: special tokens, bytes, words; an added token that is not special at the end."""
    vocab = {token: i for i, token in enumerate(first + [f"<0x{byte:02X}>" for byte in range(256)] + WORDS)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *steps])
    return _with_added(backend)


def _with_added(backend: Backend) -> Tokenizer:
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    backend.add_tokens([AddedToken("<think> a", special=False)])
    return Tokenizer(lambda: None, backend, eos_token_id=2, bos_token_id=1)


def word_piece() -> Tokenizer:
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    backend = Backend(models.WordPiece(vocab=vocab, unk_token="<unk>"))
    backend.decoder = decoders.WordPiece()
    return _with_added(backend)


def metaspace() -> Tokenizer:
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    return _with_added(backend)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    first = ["<unk>", "<s>", "</s>"]
    return {
        "byte level": load_tokenizer(str(folder), revision=None),
        "byte fallback": byte_fallback(first),
        "byte fallback, first space off": byte_fallback(first, decoders.Strip(" ", 1, 0)),
        "word piece": word_piece(),
        "metaspace": metaspace(),
    }


KINDS = ["byte level", "byte fallback", "byte fallback, first space off", "word piece", "metaspace"]
FIXED = KINDS[:3]


def pieces(tokenizer: Tokenizer, token_ids: list[int], *options: bool, **more: bool) -> list[str]:
    stream = DetokenizerStream(tokenizer, *options, **more)
    return [*(stream.step(token_id) for token_id in token_ids), stream.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=200)
@given(data=st.data(), skip=st.booleans(), spaces=st.booleans(), follows=st.booleans())
def test_however_tokens_come_their_text_is_the_same(
    tokenizers: dict[str, Tokenizer], kind: str, data: st.DataObject, skip: bool, spaces: bool, follows: bool
) -> None:
    """One by one, in any portions, as a whole; ids beyond the vocabulary add nothing."""
    tokenizer = tokenizers[kind]
    token_ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 2), max_size=30))
    one_by_one = "".join(pieces(tokenizer, token_ids, skip, spaces, follows_text=follows))
    stream = DetokenizerStream(tokenizer, skip, spaces, follows_text=follows)
    text, rest = "", token_ids
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        text += stream.feed(rest[:size])
        rest = rest[size:]
    assert text + stream.flush() == one_by_one
    if spaces and not follows:
        assert tokenizer.decode(token_ids, skip_special_tokens=skip) == one_by_one


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=200)
@given(data=st.data(), skip=st.booleans())
def test_texts_here_are_those_of_the_next_step(
    tokenizers: dict[str, Tokenizer], kind: str, data: st.DataObject, skip: bool
) -> None:
    tokenizer = tokenizers[kind]
    stream = DetokenizerStream(tokenizer, skip, follows_text=True)
    for token_id in data.draw(st.lists(st.integers(0, len(tokenizer) + 2), max_size=12)):
        texts = stream.texts_here()
        piece = stream.step(token_id)
        assert texts(token_id) == piece, "also when the stream has gone on"


@pytest.mark.parametrize("kind", FIXED)
@settings(deadline=None, max_examples=200)
@given(text=st.text("a你😀 é🎉b", max_size=12), data=st.data())
def test_valid_text_cut_anywhere(tokenizers: dict[str, Tokenizer], kind: str, text: str, data: st.DataObject) -> None:
    """Whole characters are kept and come with their last byte; what is left of one is a single U+FFFD, at the end."""
    tokenizer = tokenizers[kind]
    vocab = tokenizer._backend.get_vocab()  # type: ignore[union-attr]
    encoded = text.encode()
    token_ids = list(encoded) if kind == "byte level" else [vocab[f"<0x{byte:02X}>"] for byte in encoded]
    cut = data.draw(st.integers(0, len(token_ids)))
    *early, last = pieces(tokenizer, token_ids[:cut], True, follows_text=True)
    whole = encoded[:cut].decode(errors="ignore")
    assert "".join(early) == whole
    assert last == ("\ufffd" if len(whole.encode()) < cut else "")


@pytest.mark.parametrize("kind", FIXED)
@settings(deadline=None, max_examples=200)
@given(data=st.data(), skip=st.booleans())
def test_what_is_utf8_is_decoded_as_by_the_tokenizers_package(
    tokenizers: dict[str, Tokenizer], kind: str, data: st.DataObject, skip: bool
) -> None:
    """What is not, differs on purpose: the package makes every byte token of a run U+FFFD for one that is wrong."""
    tokenizer = tokenizers[kind]
    token_ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 2), max_size=20))
    text = tokenizer.decode(token_ids, skip_special_tokens=skip)
    if "\ufffd" not in text:
        assert text == tokenizer.decode_whole(token_ids, skip)


def test_which_schemes_are_fixed(tokenizers: dict[str, Tokenizer]) -> None:
    assert {kind for kind in KINDS if tokenizers[kind].fixed_scheme is not None} == set(FIXED)
    backend = tokenizers["byte fallback"]._backend
    assert backend is not None
    content = json.loads(backend.to_str())
    for steps in (
        [{"type": "Replace", "pattern": {"Regex": "▁+"}, "content": " "}, {"type": "Fuse"}],
        [{"type": "Strip", "content": " ", "start": 1, "stop": 0}, {"type": "Fuse"}],
        [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 1}],
        [{"type": "ByteFallback"}],
    ):
        content["decoder"] = {"type": "Sequence", "decoders": steps}
        other = Tokenizer(lambda: None, Backend.from_str(json.dumps(content)), eos_token_id=2, bos_token_id=1)
        assert other.fixed_scheme is None, steps


def test_the_first_space_stays_after_a_prompt(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte fallback, first space off"]
    vocab = tokenizer._backend.get_vocab()  # type: ignore[union-attr]
    token_ids = [vocab["▁Hello"], vocab["▁world"]]
    assert "".join(pieces(tokenizer, token_ids, True)) == "Hello world"
    assert "".join(pieces(tokenizer, token_ids, True, follows_text=True)) == " Hello world"


def test_a_window_without_text_is_bounded(tokenizers: dict[str, Tokenizer]) -> None:
    """An endless run of characters that a window scheme cannot finish comes out all the same."""
    tokenizer = metaspace()
    tokenizer.decode_whole = lambda token_ids, skip: "\ufffd" * len(token_ids)  # type: ignore[method-assign]
    assert [bool(piece) for piece in pieces(tokenizer, [3] * 32, True)].count(True) == 2


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return load_tokenizer("demo", revision=None)


@pytest.mark.demo_model
@settings(deadline=None, max_examples=100)
@given(token_ids=st.lists(st.integers(0, 49_160), max_size=40), skip=st.booleans(), size=st.integers(1, 7))
def test_the_demo_models_tokenizer(demo: Tokenizer, token_ids: list[int], skip: bool, size: int) -> None:
    stream = DetokenizerStream(demo, skip)
    portions = [token_ids[start : start + size] for start in range(0, len(token_ids), size)]
    text = "".join([stream.feed(portion) for portion in portions]) + stream.flush()
    assert text == "".join(pieces(demo, token_ids, skip)) == demo.decode_whole(token_ids, skip)
