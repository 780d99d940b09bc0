"""The text half of `nanovllm check-model`: token ids, chat template and stop tokens beside the model's own tokenizer.

Owns the texts and the comparison. The other side is transformers' AutoTokenizer, called as its users call it.
Invariant: what cannot be compared is said, and does not count as equal.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanovllm.tokenizer import Tokenizer

TEXTS = (
    "Hello, world! It's 12:30 on 2024-02-29, and we've 1,234,567.89 reasons.",
    "  two spaces,\ttabs\t\tand\n\n\nlines \r\n at the end  ",
    "Ça va? Größe, naïve, Łódź, İstanbul, ĳ, ﬁ, e\u0301, ½, ²",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم",  # noqa: RUF001
    "你好，世界。これはテストです。안녕하세요 세계. 繁體中文",  # noqa: RUF001
    "नमस्ते दुनिया। สวัสดีชาวโลก வணக்கம்",
    "👩‍👩‍👧‍👦 🇩🇪 🤷🏽‍♀️ \U0001f9d1\u200d\U0001f4bb",
    'def f(x: int) -> str:\n    """Doc."""\n    return f"{x:>08b}"  # 100%\n',
    "<div class='a'>&nbsp;</div>\n```json\n{\"a\": [1, 2.5e-3, null]}\n```",
    "x_{n+1} = \\frac{1}{2}\\left(x_n + \\frac{S}{x_n}\\right) \\quad \\forall n \\in \\mathbb{N}",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 0000000000000000 ________________ ================",
    "",
)
CONVERSATION = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "And 3 + 3?\n"},
]


class Verdict(NamedTuple):
    """What was compared, how many of how many were equal (0 of 0: not compared), and what differs or why not."""

    what: str
    equal: int
    compared: int
    note: str = ""

    @property
    def agrees(self) -> bool:
        return self.equal == self.compared


def compare_tokenizers(ours: Tokenizer, stop_ids: Sequence[int], source: Path) -> list[Verdict]:
    """source: a folder that transformers reads. stop_ids: what the engine stops at."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    pairs = [(text, ours.encode(text), list(theirs(text)["input_ids"])) for text in TEXTS]
    different = [_first_difference(text, ids, their_ids) for text, ids, their_ids in pairs if ids != their_ids]
    tokens = Verdict("token ids", len(pairs) - len(different), len(pairs), "; ".join(different[:3]))
    return [tokens, _compare_chat(ours, theirs), _compare_stops(stop_ids, theirs, source)]


def _first_difference(text: str, ours: Sequence[int], theirs: Sequence[int]) -> str:
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"{text[:30]!r} from token {same} on: {list(ours[same : same + 4])} and {list(theirs[same : same + 4])}"


def _compare_chat(ours: Tokenizer, theirs: Any) -> Verdict:
    if not getattr(theirs, "chat_template", None):
        return Verdict("chat template", 0, 0, "the model's tokenizer has none")
    sides: list[Callable[[], Any]] = [
        lambda: ours.apply_chat_template(CONVERSATION),
        lambda: theirs.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=True, return_dict=False),
    ]
    try:
        our_ids, their_ids = (list(side()) for side in sides)
    except Exception as error:  # a template is a program of its own, and may raise whatever it likes
        return Verdict("chat template", 0, 1, f"{type(error).__name__}: {error}")
    return Verdict("chat template", int(our_ids == their_ids), 1, "" if our_ids == their_ids else "other token ids")


def _compare_stops(stop_ids: Sequence[int], theirs: Any, source: Path) -> Verdict:
    from transformers import GenerationConfig

    try:
        stated = GenerationConfig.from_pretrained(source, local_files_only=True).eos_token_id
    except OSError:  # there is none: then the tokenizer's word is all there is
        stated = None
    ids = stated if isinstance(stated, list) else [stated]
    expected = {token_id for token_id in (*ids, theirs.eos_token_id) if token_id is not None}
    note = "" if set(stop_ids) == expected else f"{sorted(stop_ids)} and {sorted(expected)}"
    return Verdict("stop tokens", int(not note), 1, note)
