"""StructuredOutputsParams: a form that the output of one request must have, checked when it is made.

Owns the ways to say it; `structured/` makes masks of it. Invariant: an instance that exists holds exactly one form, as
plain data: it travels to other processes, and equal ones are equal.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from nanovllm.options import check_fields, option, takes_options


def _read_schema(schema: Any) -> str | None:
    """JSON text of a schema in any of its forms. A pydantic model is known by its method: nothing is imported."""
    if schema is None:
        return None
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if isinstance(schema, str):
        try:
            json.loads(schema)
        except json.JSONDecodeError as error:
            raise ValueError(f"structured_outputs.json is no JSON ({error}): {schema!r}") from error
        return schema
    if not isinstance(schema, Mapping):
        raise TypeError(
            f"structured_outputs.json must be a schema (dict or JSON text) or a pydantic model, got {schema!r}"
        )
    try:
        return json.dumps(dict(schema))
    except TypeError as error:
        raise TypeError(f"structured_outputs.json holds what is no JSON: {error}") from error


@takes_options
@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """A form that the output must have: exactly one of these. Raises TypeError or ValueError that names the field.

    json: a JSON schema as a dict or text, or a pydantic model class; kept as text.
    regex: a regular expression that the whole output matches.
    choice: the output is one of these strings.
    grammar: a context-free grammar, in Lark's notation or (with "::=") in GBNF.
    """

    json: str | Mapping[str, Any] | type | None = option(None, read=_read_schema)
    regex: str | None = None
    choice: tuple[str, ...] | list[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            raise ValueError(f"structured_outputs needs one of json, regex, choice and grammar, got {given or 'none'}")
        check_fields(self, "structured_outputs.")
        if self.choice is not None and (not self.choice or not all(self.choice)):
            raise ValueError(
                f"structured_outputs.choice must hold one or more strings, none of them empty, got {self.choice!r}"
            )

    @property
    def kind(self) -> tuple[str, Any]:
        """The field that is set, and its value."""
        return next((field.name, value) for field in fields(self) if (value := getattr(self, field.name)) is not None)
