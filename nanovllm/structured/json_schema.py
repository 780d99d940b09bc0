"""JSON schemas as people and pydantic write them, for a library that refuses what it does not know.

Owns which keywords may be left out: `format` is an annotation in JSON Schema, so a name that is not known is passed
over; `uniqueItems` is passed over with a warning, for no grammar can hold it. Invariant: only keywords change, never
data: what stands in `const`, `enum`, `default` and `examples`, and a property that is called "format", stay.
"""

import warnings
from collections.abc import Callable
from typing import Any

from nanovllm.structured.patterns import plain_classes

_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMAS = ("items", "prefixItems", "anyOf", "oneOf", "allOf", "additionalProperties", "additionalItems")
_OTHER_SCHEMAS = ("not", "if", "then", "else", "contains", "propertyNames", "unevaluatedItems", "unevaluatedProperties")


def simplified(schema: Any, knows_format: Callable[[str], bool], closes_objects: bool) -> Any:
    """A copy that the library takes. closes_objects: where a schema names properties, and says nothing of others, there
    are none.
    """
    if isinstance(schema, list):
        return [simplified(item, knows_format, closes_objects) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {}
    for key, value in schema.items():
        if key in _SCHEMAS_BY_NAME and isinstance(value, dict):
            names = plain_classes if key == "patternProperties" else str
            value = {names(name): simplified(one, knows_format, closes_objects) for name, one in value.items()}
        elif key in _SCHEMAS or key in _OTHER_SCHEMAS:
            value = simplified(value, knows_format, closes_objects)
        elif key == "pattern" and isinstance(value, str):
            value = plain_classes(value)
        elif key == "format" and isinstance(value, str) and not knows_format(value):
            continue
        elif key == "uniqueItems" and isinstance(value, bool):
            if value:
                warnings.warn(
                    "structured_outputs.json: uniqueItems is not enforced, since a grammar cannot; check the output",
                    stacklevel=2,
                )
            continue
        copy[key] = value
    if closes_objects and "additionalProperties" not in copy and {"properties", "patternProperties"} & copy.keys():
        copy["additionalProperties"] = False
    return copy
