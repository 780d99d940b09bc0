"""TextPrompt and TokensPrompt: the two forms of a prompt as a dict, with vLLM's names for type checkers and callers.

They are dicts: `engine/input_processor.py` reads and checks what stands in them.
"""

from typing import NotRequired, TypedDict


class TextPrompt(TypedDict):
    """A prompt as text, which is tokenized with the special tokens that the model expects."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids, computed as they are. prompt: its text, if it is known, for the output."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
