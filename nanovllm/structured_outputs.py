"""StructuredOutputsParams: a form that the output of one request must have, checked when it is made.

Owns the ways to say it; `structured/` makes masks of it. Invariant: an instance that exists holds exactly one form, as
plain data: it travels to other processes, and equal ones are equal.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import brief, cut
from nanovllm.options import check_fields, option, takes_options

MAX_FORM_CHARACTERS = 2_000_000  # a list of so many choices takes half a second to compile


def _read_schema(schema: Any) -> str | None:
    """JSON text of a schema in any of its forms. A pydantic model is known by its method: nothing is imported."""
    if schema is None:
        return None
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if isinstance(schema, str):
        try:
            json.loads(schema)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"structured_outputs.json is no JSON ({cut(str(error))}): {brief(schema)}") from error
        return schema
    if not isinstance(schema, Mapping):
        raise TypeError(
            f"structured_outputs.json must be a schema (dict or JSON text) or a pydantic model, got {brief(schema)}"
        )
    try:
        return json.dumps(dict(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"structured_outputs.json holds what is no JSON: {cut(str(error))}") from error


_FORMS = ("json", "regex", "choice", "grammar", "json_object")
_OF_JSON = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")


@takes_options
@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """A form that the output must have: one of the first five. Raises TypeError or ValueError that names the field.

    json: a JSON schema as a dict or text, or a pydantic model class; kept as text.
    regex: a regular expression that the whole output matches.
    choice: the output is one of these strings.
    grammar: a context-free grammar, in Lark's notation or (rules with "::=") in GBNF.
    json_object: True: any JSON object.
    disable_any_whitespace: no white space between the parts of JSON. For json and json_object, as the next two.
    disable_additional_properties: objects whose properties a schema names have no others, unless it allows them.
    whitespace_pattern: a regular expression of the white space between the parts of JSON.
    """

    json: str | Mapping[str, Any] | type | None = option(None, read=_read_schema)
    regex: str | None = None
    choice: tuple[str, ...] | list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in _FORMS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            names = ", ".join(_FORMS[:-1])
            raise ValueError(f"structured_outputs needs one of {names} and {_FORMS[-1]}, got {given or 'none'}")
        check_fields(self, "structured_outputs.")
        if self.choice is not None and (not self.choice or not all(self.choice)):
            raise ValueError(
                f"structured_outputs.choice must hold one or more strings, none of them empty, got {brief(self.choice)}"
            )
        for name in _OF_JSON:
            if getattr(self, name) and given[0] not in ("json", "json_object"):
                raise ValueError(f"structured_outputs.{name} is for json and json_object, and {given[0]} is given")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise ValueError("structured_outputs.whitespace_pattern says which white space disable_any_whitespace bans")
        size = sum(map(len, self.choice)) if self.choice is not None else len(str(self.kind[1]))
        if size > MAX_FORM_CHARACTERS:
            raise ValueError(
                f"structured_outputs.{given[0]} has {size:,} characters, and {MAX_FORM_CHARACTERS:,} is the most"
            )

    @property
    def kind(self) -> tuple[str, Any]:
        """The form that is set, and its value."""
        return next((name, value) for name in _FORMS if (value := getattr(self, name)) not in (None, False))
