"""The tools that a client offers a model, and the form that an answer has which must call one.

Owns `tools`, `tool_choice` and `parallel_tool_calls` of a body. Invariant: a tool that is chosen by the client, by
name or as "required", is called with arguments that fit its schema, whatever the model is; "auto" leaves it to the
model, and to whoever reads its calls (`response_templates`).
"""

from dataclasses import dataclass
from typing import Any

from nanovllm.server.body import BadRequest, Body
from nanovllm.server.growing_calls import GrowingCalls
from nanovllm.server.reply import FormReader
from nanovllm.structured_outputs import StructuredOutputsParams

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Tools:
    """functions: {"name", "description", "parameters"} each. choice: "auto", "required", or the name of one."""

    functions: tuple[dict[str, Any], ...]
    choice: str = "auto"
    is_named: bool = False
    is_parallel: bool = True

    @property
    def is_forced(self) -> bool:
        return self.is_named or self.choice == "required"

    def for_template(self) -> list[dict[str, Any]]:
        return [{"type": "function", "function": function} for function in self.functions]

    def form(self) -> StructuredOutputsParams:
        """Of an answer where a call is forced: the arguments of the one that is named, or a list of calls."""
        if self.is_named:
            (chosen,) = (function for function in self.functions if function["name"] == self.choice)
            return StructuredOutputsParams(json=_schema(chosen))
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "arguments": _moved(_schema(function), f"#/items/anyOf/{i}/properties/arguments"),
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for i, function in enumerate(self.functions)
        ]
        most = {} if self.is_parallel else {"maxItems": 1}
        return StructuredOutputsParams(json={"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}})

    def form_reader(self, is_stream: bool) -> FormReader:
        """is_stream: arguments come as they grow."""
        name = self.choice if self.is_named else None
        growing = GrowingCalls(name, self.is_parallel) if is_stream else None
        if self.is_named:
            return FormReader(lambda value: [{"name": self.choice, "arguments": value}], growing)
        return FormReader(list, growing)


def _schema(function: dict[str, Any]) -> dict[str, Any]:
    return function.get("parameters") or NO_ARGUMENTS


def _moved(schema: Any, place: str) -> Any:
    """A schema that stands at `place` of another one: its references lead from the other's root."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value[1:] if key == "$ref" and isinstance(value, str) and value.startswith("#") else
        _moved(value, place)
        for key, value in schema.items()
    }  # fmt: skip


def take_tools(body: Body) -> Tools | None:
    """As chat completions have them. None: there are none, or none may be called."""
    given: list[Any] = body.take("tools", list, [])
    choice = body.take("tool_choice", (str, dict), "auto")
    is_parallel = body.take("parallel_tool_calls", bool, True)
    functions = []
    for i, item in enumerate(given):
        tool = body.of(item, f"tools[{i}]")
        tool.choose("type", ("function",), "function")
        functions.append(take_function(tool.require_inner("function")))
        tool.finish()
    name = None
    if isinstance(choice, dict):
        chosen = body.of(choice, "tool_choice")
        chosen.choose("type", ("function",), "function")
        function = chosen.require_inner("function")
        name = function.require("name", str)
        function.finish()
        chosen.finish()
    elif choice not in ("none", "auto", "required"):
        raise BadRequest(
            f"tool_choice must be 'none', 'auto', 'required' or an object with a function's name, got {choice!r}",
            param="tool_choice",
        )
    return make_tools(functions, choice if name is None else name, name is not None, is_parallel)


def take_function(function: Body) -> dict[str, Any]:
    name = function.require("name", str)
    description, parameters = function.take("description", str), function.take("parameters", dict)
    function.ignore("strict")  # with a forced call it is so; a free one is the model's own
    function.finish()
    return {
        "name": name,
        **({"description": description} if description is not None else {}),
        "parameters": parameters if parameters is not None else NO_ARGUMENTS,
    }


def make_tools(functions: list[dict[str, Any]], choice: str, is_named: bool, is_parallel: bool) -> Tools | None:
    """Raises BadRequest for a choice that is not there."""
    names = [function["name"] for function in functions]
    if len(set(names)) < len(names):
        raise BadRequest(f"tools hold a name twice: {sorted(names)}", param="tools")
    if is_named and choice not in names:
        raise BadRequest(f"tool_choice names {choice!r}, and tools hold {names}", param="tool_choice")
    if not functions and choice == "required":
        raise BadRequest("tool_choice 'required' needs tools", param="tool_choice")
    if not functions or (choice == "none" and not is_named):
        return None
    return Tools(tuple(functions), choice, is_named, is_parallel)
