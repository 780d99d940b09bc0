"""GBNF, llama.cpp's notation of grammars, for a library that reads Lark's.

Owns what the library's own converter leaves to its caller: which notation a grammar is in, escapes, character classes
as GBNF means them, names that Lark does not allow, rules that run over lines. Invariant: a character in a literal or a
class stands for itself.
"""

import re
from collections.abc import Iterator

from llguidance.gbnf_to_lark import gbnf_to_lark

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\r\n]*)
    | (?P<rule>[\w-]+[ \t]*::=)
    | (?P<name>[\w-]+)
    | (?P<literal>"(?:\\.|[^"\\])*")
    | (?P<class>\[\^?(?:\\.|[^\]\\])*\])
    | (?P<count>\{[^}]*\})
    | (?P<sign>[().|*+?])""",
    re.VERBOSE | re.DOTALL,
)
_CHARACTER = re.compile(r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\(.)|(.)", re.DOTALL)
_NAMED = {"n": "\n", "r": "\r", "t": "\t"}
_FIRST_STATEMENT = re.compile(r"(?:\s+|\#[^\n]*|//[^\n]*)*[?!]?([\w.-]+)\s*(::=)?")
_ANYTHING = "[\\x00-\U0010ffff]"


def is_gbnf(grammar: str) -> bool:
    """Whether the grammar's first statement is a rule in GBNF's notation."""
    first = _FIRST_STATEMENT.match(grammar)
    return first is not None and first[2] is not None


def to_lark(grammar: str) -> str:
    """Raises ValueError for what is no GBNF."""
    converted = gbnf_to_lark(_normalize(grammar))
    assert isinstance(converted, str)
    return converted


def _normalize(grammar: str) -> str:
    """The same grammar in the part of the notation that the converter reads as it is meant."""
    tokens = list(_tokens(grammar))
    names = _names([text.removesuffix("::=").strip() for kind, text in tokens if kind == "rule"])
    parts = []
    for kind, text in tokens:
        match kind:
            case "rule":
                parts.append(f"\n{names[text.removesuffix('::=').strip()]} ::=")
            case "name":
                if text not in names:
                    raise ValueError(f"rule {text!r} is used and not defined")
                parts.append(names[text])
            case "literal":
                parts.append(_literal(list(_characters(text[1:-1]))))
            case "class":
                parts.append(_class(text))
            case "count":
                parts.append(text.replace("{,", "{0,"))
            case _:
                parts.append(_ANYTHING if text == "." else text)
    # Counts belong to what stands before them, with nothing between.
    return re.sub(r" (?=[*+?{])", "", " ".join(parts)).strip() + "\n"


def _tokens(grammar: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(grammar):
        found = _TOKEN.match(grammar, at)
        if found is None:
            line = grammar.count("\n", 0, at) + 1
            raise ValueError(f"line {line} of the grammar is no GBNF from {grammar[at : at + 30]!r} on")
        at = found.end()
        if found.lastgroup != "space":
            assert found.lastgroup is not None
            yield found.lastgroup, found[0]


def _names(rules: list[str]) -> dict[str, str]:
    """A name for each rule that is one in Lark, too, and in no case the one that its first rule has there."""
    if "root" not in rules:
        raise ValueError("the grammar has no rule named root")
    names = {"root": "root"}
    taken = {"root", "start"}
    for rule in rules:
        if rule in names:
            continue
        name = re.sub(r"\W", "_", re.sub(r"([a-z])([A-Z])", r"\1_\2", rule)).lower()
        name = name if name[0].isalpha() else f"rule_{name}"
        while name in taken:
            name += "_x"
        names[rule] = name
        taken.add(name)
    return names


def _characters(text: str) -> Iterator[str]:
    for two, four, eight, escaped, plain in _CHARACTER.findall(text):
        digits = two or four or eight
        if digits and int(digits, 16) > 0x10FFFF:
            raise ValueError(f"U+{digits} is no character")
        yield chr(int(digits, 16)) if digits else _NAMED.get(escaped, escaped) or plain


def _literal(characters: list[str]) -> str:
    """Characters that do not print are classes: Lark's strings have no escapes that the converter would leave alone."""
    parts: list[str] = []
    for character in characters:
        if not character.isprintable():
            parts.append(_one(character))
        elif parts and parts[-1][0] == '"':
            parts[-1] = parts[-1][:-1] + _quoted(character) + '"'
        else:
            parts.append(f'"{_quoted(character)}"')
    return parts[0] if len(parts) == 1 else f"({' '.join(parts)})" if parts else '""'


def _quoted(character: str) -> str:
    return "\\" + character if character in '"\\' else character


def _one(character: str) -> str:
    return f"[\\x{ord(character):02x}]" if ord(character) < 256 else f"[{character}]"


def _class(text: str) -> str:
    """Each member written so that it is nothing else in a regular expression."""
    negated = "^" if text.startswith("[^") else ""
    source = text[2 if negated else 1 : -1]
    members = [(found[0] == "-", "".join(_characters(found[0]))) for found in _CHARACTER.finditer(source)]
    parts = []
    for i, (is_dash, member) in enumerate(members):
        is_range = is_dash and 0 < i < len(members) - 1
        parts.append("-" if is_range else _one(member)[1:-1] if not member.isalnum() else member)
    return f"[{negated}{''.join(parts)}]"
