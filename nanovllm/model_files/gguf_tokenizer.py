"""build_gguf_tokenizer: a `tokenizers.Tokenizer` from the metadata of a GGUF file.

Owns how llama.cpp's tokenizer metadata translate: vocabulary, merges, how text is cut before merging, special tokens.
Does not own encoding and decoding (`tokenizer.py`). Invariant: it gives the tokens of the model's own Hugging Face
tokenizer, or refuses the file by name; a cut (`tokenizer.ggml.pre`) that is only similar is never used.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from nanovllm.model_files.gguf_file import GGUFFile

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type


@dataclass(frozen=True)
class _Cut:
    """How a byte-level vocabulary's text is cut into words. regex None is GPT-2's own."""

    regex: str | None
    individual_digits: bool = False
    normalize_nfc: bool = False
    ignore_merges: bool = False  # a word that is a token stays whole, whatever the merges say
    adds_bos: bool = False  # if the metadata do not say


_QWEN2_CUT = _Cut(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    normalize_nfc=True,
)
_LLAMA3_CUT = _Cut(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+",
    ignore_merges=True,
    adds_bos=True,
)
_TEKKEN_CUT = _Cut(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ignore_merges=True,
    adds_bos=True,
)
_CUTS = {
    "gpt-2": _Cut(None),
    "smollm": _Cut(None, individual_digits=True),
    "llama-bpe": _LLAMA3_CUT,
    "llama3": _LLAMA3_CUT,
    "llama-v3": _LLAMA3_CUT,
    "tekken": _TEKKEN_CUT,
    "qwen2": _QWEN2_CUT,
    "deepseek-r1-qwen": _QWEN2_CUT,
}


def build_gguf_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """Build the tokenizer of the .gguf file at `path`.

    Returns it with what Hugging Face's wrapper is told beside it: bos_token, eos_token, pad_token, unk_token and
    chat_template, each only if the metadata have it. Raises NotImplementedError for a kind that is not known,
    ValueError if the metadata are incomplete.
    """
    metadata = GGUFFile(path).metadata
    kind = metadata.get("tokenizer.ggml.model")
    tokens, token_types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if kind is None or tokens is None or token_types is None:
        raise ValueError(f"{path} holds no tokenizer: give one with tokenizer=, a folder or a Hub name")
    if kind == "gpt2":
        tokenizer, adds_bos = _byte_level(path, metadata, tokens)
    elif kind == "llama":
        # User-defined tokens, as Gemma has for runs of spaces, are looked for in the text as it is.
        tokens = [
            token.replace("▁", " ") if token_type == _USER_DEFINED else token
            for token, token_type in zip(tokens, token_types.tolist(), strict=True)
        ]
        tokenizer, adds_bos = _sentencepiece(path, metadata, tokens, token_types.tolist()), True
    else:
        raise NotImplementedError(
            f"{path}: tokenizer kind {kind!r} is not supported (gpt2, llama are): give the model's own with tokenizer="
        )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=token_type == _CONTROL, normalized=False)
            for token, token_type in zip(tokens, token_types.tolist(), strict=True)
            if token_type in (_CONTROL, _USER_DEFINED)
        ]
    )
    special = _special_tokens(metadata, tokens)
    _add_bos_and_eos(tokenizer, metadata, special, adds_bos)
    if "tokenizer.chat_template" in metadata:
        special["chat_template"] = metadata["tokenizer.chat_template"]
    return tokenizer, special


def _byte_level(path: Path, metadata: dict[str, Any], tokens: list[str]) -> tuple[Tokenizer, bool]:
    """GPT-2's scheme: text is cut, its UTF-8 bytes are written as printable characters, and those are merged."""
    name = metadata.get("tokenizer.ggml.pre")
    if name not in _CUTS:
        raise NotImplementedError(
            f"{path}: tokenizer.ggml.pre is {name!r}; supported: {', '.join(_CUTS)}. Give the model's own tokenizer "
            "with tokenizer=, a folder or a Hub name"
        )
    cut = _CUTS[name]
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut.ignore_merges))
    if cut.normalize_nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if cut.individual_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if cut.regex is not None:
        steps.append(pre_tokenizers.Split(Regex(cut.regex), behavior="isolated"))
    # With use_regex it also cuts as GPT-2 does.
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.regex is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, cut.adds_bos


def _sentencepiece(path: Path, metadata: dict[str, Any], tokens: list[str], token_types: list[int]) -> Tokenizer:
    """SentencePiece's BPE: spaces become U+2581, unknown characters fall back to byte tokens <0x00> ... <0xFF>."""
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or token_types.count(_UNKNOWN) != 1:
        raise ValueError(f"{path}: a tokenizer of kind 'llama' needs tokenizer.ggml.scores and one unknown token")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = _merges_from_scores(vocabulary, scores.tolist(), token_types)
    unknown = tokens[token_types.index(_UNKNOWN)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    has_prefix_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    prefix = [normalizers.Prepend("▁")] if has_prefix_space else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix_space:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_from_scores(
    vocabulary: dict[str, int], scores: list[float], token_types: list[int]
) -> list[tuple[str, str]]:
    """SentencePiece keeps no merge list: two neighbours may merge if the result is a token, best score first."""
    normal = {token: index for token, index in vocabulary.items() if token_types[index] == 1}
    merges = []
    for token, index in normal.items():
        for split in range(1, len(token)):
            left, right = normal.get(token[:split]), normal.get(token[split:])
            if left is not None and right is not None:
                merges.append((-scores[index], index, left, right, token[:split], token[split:]))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _special_tokens(metadata: dict[str, Any], tokens: list[str]) -> dict[str, str]:
    special = {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
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
