"""Kinds of tokens in a GGUF file's metadata, and which of them end a text.

Owns what token types and names mean, without torch and tokenizers: the checkpoint and the tokenizer of a file both ask.
Invariant: a chat model's end of turn is found also in files whose converter did not write it down.
"""

from typing import Any

import numpy as np

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type

# Files of many months have an `eos_token_id` for the end of a document and nothing for the end of a turn, which
# llama.cpp then knows by its name, whatever type the token has.
_ENDS_OF_TURNS = frozenset(
    "<|eot_id|> <|eom_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <EOT> _<EOT> [EOT] "
    "<end_of_utterance> <turn|> [e~[ <\uff5cend\u2581of\u2581sentence\uff5c>".split()
)
# Only asked where the file does not say; as plain text they are tags of HTML in some vocabularies (Gemma's).
_ENDS_OF_DOCUMENTS = frozenset("<|endoftext|> <|end_of_text|> [EOS] </s> <eos>".split())


def token_types(metadata: dict[str, Any]) -> list[int]:
    """One a token; all normal if the file does not say."""
    types = metadata.get("tokenizer.ggml.token_type")
    if isinstance(types, np.ndarray):
        return [int(token_type) for token_type in types]
    return [NORMAL] * len(metadata.get("tokenizer.ggml.tokens", ()))


def ends_turn(token: str) -> bool:
    return token in _ENDS_OF_TURNS


def end_of_generation_ids(metadata: dict[str, Any]) -> list[int]:
    """What the file says ends a document, a turn or a message, and the ends of turns that are known by their names."""
    stated = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        tokens = []
    found = [index for index, token in enumerate(tokens) if token in _ENDS_OF_TURNS]
    if {"<|return|>", "<|calls|>"}.intersection(tokens):  # families where <|end|> ends a message, not the turn
        found = [index for index in found if tokens[index] != "<|end|>"]
    if stated[0] is None:
        types = token_types(metadata)
        found += [
            index
            for index, (token, token_type) in enumerate(zip(tokens, types, strict=False))
            if token in _ENDS_OF_DOCUMENTS and token_type == CONTROL
        ]
    return list(dict.fromkeys(token_id for token_id in (*stated, *found) if token_id is not None))
