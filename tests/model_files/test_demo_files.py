"""The demo model's file, read by this package and by transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.model_files.demo_model import ensure_demo_model
from nanovllm.model_files.tokenizer_files import load_tokenizer
from nanovllm.tokenizer import Tokenizer
from nanovllm.weights.checkpoint import Checkpoint, open_checkpoint

pytestmark = pytest.mark.demo_model

TEXTS = [
    "Hello world, it's we'll I'd DON'T",
    "  many   spaces \t\n\n  x\r\n",
    "def f(x):\n    return x ** 2  # fine\n",
    "日本語テスト 한국어 العربية हिन्दी",
    "😀👩\u200d👩\u200d👧\u200d👦🇫🇷 é e\u0301",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "a\u00a0b\u2003c\x00\ufffd",
    "",
]
# Of many languages and of code, as for other real tokenizers (tests/integrations/test_real_tokenizers.py).
TEXTS += [
    text
    for text in json.loads((Path(__file__).parent / "texts.json").read_text(encoding="utf-8"))
    if not any(character.isnumeric() for character in text)  # see DIGITS
]
DIGITS = ["1234567890 3.14 ²³ Ⅷ ½ ٣", "\n\n    1. item\n    12. item", "x1y22z333"]


@pytest.fixture(scope="module")
def path() -> Path:
    return ensure_demo_model(progress=False)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("demo", revision=None)


@pytest.fixture(scope="module")
def checkpoint(path: Path) -> Checkpoint:
    return open_checkpoint("demo", load_format="auto", revision=None)


@pytest.fixture(scope="module")
def hf_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_special_tokens_are_those_of_the_metadata(tokenizer: Tokenizer, checkpoint: Checkpoint) -> None:
    assert checkpoint.generation_config == {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 2}
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.hf.pad_token_id) == (2, 1, 2)
    assert (tokenizer.hf.eos_token, tokenizer.hf.unk_token) == ("<|im_end|>", "<|endoftext|>")


def test_tokens_equal_those_of_transformers(tokenizer: Tokenizer, hf_tokenizer: Any) -> None:
    for text in TEXTS:
        assert tokenizer.encode(text) == hf_tokenizer(text).input_ids
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_digits_are_cut_first(tokenizer: Tokenizer, hf_tokenizer: Any) -> None:
    """The model was trained on single digits, cut before anything else; transformers' conversion drops that step."""
    from tokenizers import pre_tokenizers

    backend = hf_tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in DIGITS:
        assert tokenizer.encode(text) == backend.encode(text).ids


def test_chat_template(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    text = tokenizer.decode(token_ids, skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\n") and text.endswith("user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_weights_equal_those_of_transformers(path: Path, checkpoint: Checkpoint) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    expected = model.state_dict()
    num_read = 0
    for name, tensor in checkpoint.tensors(torch.float32):
        assert torch.equal(tensor, expected.pop(name)), name
        num_read += 1
    assert num_read == 272
    assert set(expected) <= {"lm_head.weight"}
    assert model.config.num_key_value_heads == checkpoint.config["num_key_value_heads"]
