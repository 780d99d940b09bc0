"""How the text of a byte-level vocabulary is cut into words before merging, by the name that llama.cpp has for it.

Owns the table; the expressions are those of the models' own tokenizer.json files. Invariant: a name that is not in it
has a cut that is not known here, and the file is refused: a cut that is only similar would give other tokens.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Cut:
    """regexes: each cuts the pieces of the one before it, into matches and what is between them.

    ends_as_gpt2: GPT-2's own comes after them.
    """

    regexes: tuple[str, ...]
    ends_as_gpt2: bool = False
    normalize_nfc: bool = False
    ignore_merges: bool = False  # a word that is a token stays whole, whatever the merges say
    adds_bos: bool = False  # if the metadata do not say


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _words_by_case(after: str, but: str = "") -> str:
    """but: which letters are in no word."""
    before, upper, lower = r"[^\r\n\p{L}\p{N}]?", f"[{_UPPER}{but}]", f"[{_LOWER}{but}]"
    return rf"{before}{upper}*{lower}+{after}|{before}{upper}+{lower}*{after}"


_GPT2 = Cut((), ends_as_gpt2=True)
_SINGLE_DIGITS = Cut((r"\p{N}",), ends_as_gpt2=True)
_DIGITS_BY_THREE = Cut((rf"{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_ENDS}",))
_LLAMA3 = replace(_DIGITS_BY_THREE, ignore_merges=True, adds_bos=True)
_PLAIN_QWEN2 = Cut((rf"{_WORD}|\p{{N}}|{_SIGNS}|{_ENDS}",))
_QWEN2 = replace(_PLAIN_QWEN2, normalize_nfc=True)
_QWEN35 = Cut(
    (rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_ENDS}",),
    normalize_nfc=True,
)
_TEKKEN = Cut(
    (rf"{_words_by_case('')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}",), ignore_merges=True, adds_bos=True
)
_GPT4O = Cut((rf"{_words_by_case(_CONTRACTION + '?')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}",))
_KIMI_WORD = _words_by_case(_CONTRACTION + "?", but=r"&&[^\p{Han}]")
_KIMI = Cut((rf"\p{{Han}}+|{_KIMI_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_ENDS}",))
# Digits in threes from the right, as they are read aloud.
_TINY_AYA = replace(_GPT4O, regexes=(r"\d{1,3}(?=(?:\d{3})*\b)", *_GPT4O.regexes))
_CHINESE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_CODER = Cut((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE, r"\p{N}"))
# Letters of scripts with two cases, as far as the tokenizer knows them.
_WESTERN = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = Cut(
    (
        r"[\r\n]",
        rf"\s?[{_WESTERN}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _CHINESE,
        r"\p{N}+",
    )
)
_DEEPSEEK3 = Cut(
    (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_ENDS}",
    )
)
_SUPERBPE = Cut((r"\p{N}+", r"(?=(\d{3})+(?!\d))"))
_SEED_CODER = Cut((rf"{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_ENDS}",))
_VIKING = Cut((" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+", r"\p{N}"))

# What llama.cpp does where a file does not say which cut is its own.
DEFAULT = "default"
_UNKNOWN_CUT = Cut(
    (
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        "[0-9][0-9][0-9]",
    )
)

CUTS = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "gigachat", "a.x-4.0", "mellum", "trillion"), _GPT2),
    **dict.fromkeys(("granite-docling", "exaone4"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"), _SINGLE_DIGITS),
    "command-r": replace(_SINGLE_DIGITS, normalize_nfc=True),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA3
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), _DIGITS_BY_THREE),
    **dict.fromkeys(("glm4", "glm5"), replace(_DIGITS_BY_THREE, ignore_merges=True)),
    "tekken": _TEKKEN,
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2"), _QWEN2),
    **dict.fromkeys(("megrez", "hunyuan", "stablelm2", "solar-open", "grok-2"), _PLAIN_QWEN2),
    "qwen35": _QWEN35,
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _GPT4O),
    "kimi-k2": _KIMI,
    **dict.fromkeys(("tiny_aya", "cohere2moe"), _TINY_AYA),
    "deepseek-coder": _DEEPSEEK_CODER,
    "deepseek-llm": _DEEPSEEK_LLM,
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK3),
    "superbpe": _SUPERBPE,
    "seed-coder": _SEED_CODER,
    "viking": _VIKING,
    DEFAULT: _UNKNOWN_CUT,
}
