"""build_gguf_tokenizer: a `tokenizers.Tokenizer` from the metadata of a GGUF file.

Owns how llama.cpp's tokenizer metadata translate: vocabulary, merges, special tokens. Does not own how text is cut
before merging (`gguf_cuts.py`), nor encoding and decoding (`tokenizer.py`). Invariant: it gives the tokens of the
model's own Hugging Face tokenizer, says that it may not, or refuses the file by name.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from nanovllm.model_files.gguf_cuts import CUTS, DEFAULT
from nanovllm.model_files.gguf_file import GGUFFile
from nanovllm.model_files.gguf_tokens import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, ends_turn, token_types


def build_gguf_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """Build the tokenizer of the .gguf file at `path`.

    Returns it with what Hugging Face's wrapper is told beside it: bos_token, eos_token, pad_token, unk_token and
    chat_template, each only if the metadata have it. Raises NotImplementedError for a kind that is not known,
    ValueError if the metadata are incomplete.
    """
    return build_tokenizer(path, GGUFFile(path).metadata)


def build_tokenizer(path: Path, metadata: dict[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """The same from metadata that were read already; `path` is for messages."""
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if kind is None or tokens is None:
        raise ValueError(f"{path} holds no tokenizer: give one with tokenizer=, a folder or a Hub name")
    types = token_types(metadata)
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{path}: tokenizer.ggml.tokens must be a list of strings")
    if len(types) != len(tokens):
        raise ValueError(f"{path}: tokenizer.ggml.token_type has {len(types)} items for {len(tokens)} tokens")
    if kind == "gpt2":
        tokenizer, adds_bos = _byte_level(path, metadata, tokens)
    elif kind == "gemma4":
        tokenizer, adds_bos = _merged_pieces(path, metadata, tokens, types), True
        metadata = {**metadata, "tokenizer.ggml.add_bos_token": True}  # early files say False, and mean it not
    elif kind == "llama":
        # User-defined tokens, as Gemma has for runs of spaces, are looked for in the text as it is.
        tokens = [
            token.replace("▁", " ") if token_type == USER_DEFINED else token
            for token, token_type in zip(tokens, types, strict=True)
        ]
        tokenizer, adds_bos = _sentencepiece(path, metadata, tokens, types), True
    else:
        raise NotImplementedError(
            f"{path}: tokenizer kind {kind!r} is not supported (gpt2, llama, gemma4 are): give the model's own with "
            "tokenizer="
        )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=token_type == CONTROL or ends_turn(token), normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type in (CONTROL, USER_DEFINED) or ends_turn(token)
        ]
    )
    special = _special_tokens(path, metadata, tokens)
    _add_bos_and_eos(tokenizer, metadata, special, adds_bos)
    if isinstance(metadata.get("tokenizer.chat_template"), str):
        special["chat_template"] = metadata["tokenizer.chat_template"]
    return tokenizer, special


def _byte_level(path: Path, metadata: dict[str, Any], tokens: list[str]) -> tuple[Tokenizer, bool]:
    """GPT-2's scheme: text is cut, its UTF-8 bytes are written as printable characters, and those are merged."""
    # Files of the first months have no such key; Qwen's cut is known by the architecture, which is nobody else's.
    by_architecture = "qwen2" if metadata.get("general.architecture") in ("qwen2", "qwen3") else DEFAULT
    name = metadata.get("tokenizer.ggml.pre", by_architecture)
    if not isinstance(name, str) or name not in CUTS:
        raise NotImplementedError(
            f"{path}: tokenizer.ggml.pre is {name!r}; supported: {', '.join(CUTS)}. Give the model's own tokenizer "
            "with tokenizer=, a folder or a Hub name"
        )
    if name == DEFAULT:
        warnings.warn(
            f"{path} does not say how its tokenizer cuts text into words, so it is cut as llama.cpp does then, and "
            "tokens may be others than the model's own; give its tokenizer with tokenizer=, a folder or a Hub name",
            stacklevel=2,
        )
    cut = CUTS[name]
    merges = _read_merges(path, metadata, set(tokens))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut.ignore_merges))
    if cut.normalize_nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    steps += [pre_tokenizers.Split(Regex(regex), behavior="isolated") for regex in cut.regexes]
    # With use_regex it also cuts as GPT-2 does.
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.ends_as_gpt2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, cut.adds_bos


def _read_merges(path: Path, metadata: dict[str, Any], vocabulary: set[str]) -> list[tuple[str, str]]:
    given = metadata.get("tokenizer.ggml.merges", [])
    merges = [tuple(merge.split(" ")) for merge in given if isinstance(merge, str)]
    for merge in merges:
        if len(merge) != 2 or not vocabulary.issuperset((*merge, "".join(merge))):
            raise ValueError(f"{path}: tokenizer.ggml.merges has {' '.join(merge)!r}, which is no pair of its tokens")
    return merges  # type: ignore[return-value]


def _sentencepiece(path: Path, metadata: dict[str, Any], tokens: list[str], token_types: list[int]) -> Tokenizer:
    """SentencePiece's BPE: spaces become U+2581, unknown characters fall back to byte tokens <0x00> ... <0xFF>."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        raise ValueError(f"{path}: a tokenizer of kind 'llama' needs tokenizer.ggml.scores, one for each token")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = _merges_from_scores(vocabulary, scores.tolist(), token_types)
    unknown = _unknown_token(path, metadata, tokens, token_types)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    has_prefix_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    prefix = [normalizers.Prepend("▁")] if has_prefix_space else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix_space:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merged_pieces(path: Path, metadata: dict[str, Any], tokens: list[str], token_types: list[int]) -> Tokenizer:
    """Gemma 4's: SentencePiece's pieces, but a list of merges says which of them become one."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = _read_merges(path, metadata, set(tokens))
    unknown = _unknown_token(path, metadata, tokens, token_types)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _unknown_token(path: Path, metadata: dict[str, Any], tokens: list[str], token_types: list[int]) -> str:
    """By its id, its type or its name, in this order: Gemma's converters give it the type of control tokens."""
    index = metadata.get("tokenizer.ggml.unknown_token_id")
    if isinstance(index, int) and 0 <= index < len(tokens):
        return tokens[index]
    if token_types.count(UNKNOWN) == 1:
        return tokens[token_types.index(UNKNOWN)]
    if "<unk>" in tokens:
        return "<unk>"
    raise ValueError(f"{path}: a tokenizer of kind 'llama' needs tokenizer.ggml.unknown_token_id or one unknown token")


def _merges_from_scores(
    vocabulary: dict[str, int], scores: list[float], token_types: list[int]
) -> list[tuple[str, str]]:
    """SentencePiece keeps no merge list: two neighbours may merge if the result is a token, best score first."""
    normal = {token: index for token, index in vocabulary.items() if token_types[index] == NORMAL}
    merges = []
    for token, index in normal.items():
        for split in range(1, len(token)):
            left, right = normal.get(token[:split]), normal.get(token[split:])
            if left is not None and right is not None:
                merges.append((-scores[index], index, left, right, token[:split], token[split:]))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _special_tokens(path: Path, metadata: dict[str, Any], tokens: list[str]) -> dict[str, str]:
    special = {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and (not isinstance(token_id, int) or token_id < 0):
            raise ValueError(f"{path}: tokenizer.ggml.{key}_token_id must be the id of a token, got {token_id!r}")
        if token_id is not None and token_id < len(tokens):
            special[name] = tokens[token_id]
    return special


def _add_bos_and_eos(tokenizer: Tokenizer, metadata: dict[str, Any], special: dict[str, str], adds_bos: bool) -> None:
    """Make encoding add the tokens that the metadata ask for around a plain prompt."""
    parts = ["$A"]
    if metadata.get("tokenizer.ggml.add_bos_token", adds_bos) and "bos_token" in special:
        parts.insert(0, special["bos_token"])
    if metadata.get("tokenizer.ggml.add_eos_token", False) and "eos_token" in special:
        parts.append(special["eos_token"])
    if len(parts) > 1:
        added = [(token, tokenizer.token_to_id(token)) for token in parts if token != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(single=parts, special_tokens=list(dict(added).items()))
