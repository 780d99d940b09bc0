"""What callers may give as prompts: one or several; TextPrompt and TokensPrompt, the forms that are dicts (as in vLLM).

Owns how one prompt is told from several; `engine/input_processor.py` reads and checks what stands in them.
"""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

_NO_LISTS = (str, Mapping, bytes, bytearray, memoryview)  # bytes are no prompt, and no list of token ids either


def list_prompts(prompts: Any) -> tuple[list[Any], bool]:
    """The prompts, and whether one was given and no list of them. A flat list of integers is one."""
    if isinstance(prompts, _NO_LISTS):
        return [prompts], True
    prompts = list(prompts)
    # An array has __index__ too: only one without dimensions is a number.
    if prompts and all(hasattr(item, "__index__") and not getattr(item, "ndim", 0) for item in prompts):
        return [prompts], True
    return prompts, False


class TextPrompt(TypedDict):
    """A prompt as text, which is tokenized with the special tokens that the model expects."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids, computed as they are. prompt: its text, if it is known, for the output."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
