"""Calls of tools as they are written: id and name once, then the arguments piece by piece.

Owns reading ahead of the parser, which knows a call when it is whole. Invariant: what is handed out as arguments is
the model's own text of one JSON object, from its first brace to its last; of other forms nothing is handed out, and
their calls come whole.
"""

import json
import re

from nanovllm.server.reply import Call, Piece, new_call_id

_NAME = r'\{\s*"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
_FIRST = re.compile(rf"\s*\[?\s*{_NAME}")
_NEXT = re.compile(rf"\s*\}}\s*,\s*{_NAME}")
_NAMED_AHEAD = re.compile(r"\s*(?=\{)")
_LONGEST_HEAD = 1000  # what is longer is no head of a call


class GrowingCalls:
    """name: of the one call whose arguments alone are written; None for an object with both, or a list of them.

    is_parallel: of a list more than one call may be begun.
    """

    def __init__(self, name: str | None, is_parallel: bool) -> None:
        self._name, self._is_one = name, name is not None or not is_parallel
        self._head = ""
        self._depth = 0  # of braces in the arguments that are being written; 0 between them
        self._is_in_string = self._is_escaped = False
        self.num_begun = 0

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while text:
            if not self._depth:
                text = self._begin(text, pieces)
                if not text:
                    break
            end = self._end_of_arguments(text)
            pieces.append(Piece("arguments", text[:end]))
            text = text[end:]
        return pieces

    def _begin(self, text: str, pieces: list[Piece]) -> str:
        """Look for the beginning of a call; what stands behind it."""
        self._head += text
        if (self.num_begun and self._is_one) or len(self._head) > _LONGEST_HEAD:
            return ""
        pattern = _NEXT if self.num_begun else _FIRST if self._name is None else _NAMED_AHEAD
        found = pattern.match(self._head)
        if found is None:
            return ""
        name = self._name if self._name is not None else json.loads(found["name"])
        pieces.append(Piece("call", call=Call(new_call_id(), name, "{")))
        rest, self._head = self._head[found.end() :], ""
        self.num_begun += 1
        self._depth, self._is_in_string, self._is_escaped = 1, False, False
        return rest[1:]

    def _end_of_arguments(self, text: str) -> int:
        for at, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_in_string:
                self._is_escaped = character == "\\"
                self._is_in_string = character != '"'
            elif character == '"':
                self._is_in_string = True
            elif character == "{":
                self._depth += 1
            elif character == "}":
                self._depth -= 1
                if not self._depth:
                    return at + 1
        return len(text)
