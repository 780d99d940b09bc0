"""Command-line flags made from the fields of an options dataclass, with the field's own documentation as help.

Owns the mapping field -> flag and back. Invariant: no flag has a default of its own; what is not given on the command
line is not passed on, so the dataclass decides. Imports no torch: help must appear at once.
"""

import argparse
import inspect
import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_origin

from nanovllm.config import EngineConfig
from nanovllm.options import accepts, kinds_of
from nanovllm.sampling_params import SamplingParams

_METAVARS = {int: "N", float: "X", str: "NAME"}


def add_engine_options(parser: argparse.ArgumentParser, exclude: Collection[str] = ()) -> None:
    """A flag for each field of EngineConfig that a flag can give, but for `exclude`."""
    group = parser.add_argument_group("engine options", "the arguments of LLM(...)")
    defaults = {field.name: _show(field.default) for field in fields(EngineConfig)}
    _add_options(group, EngineConfig, "engine", exclude, defaults)


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: str) -> None:
    """A flag for each field of SamplingParams that matters here. max_tokens: the command's default, in words."""
    group = parser.add_argument_group("sampling options", "by default as the model's generation_config.json says")
    _add_options(group, SamplingParams, "sampling", (), {"max_tokens": max_tokens})


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The engine options that were given, by field name."""
    return _given(args, "engine")


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given, by field name."""
    return _given(args, "sampling")


def field_docs(owner: type) -> dict[str, str]:
    """The help of each field: its line "name: text" in the class docstring, with the indented lines below it."""
    names = [field.name for field in fields(owner)]
    docs: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(owner.__doc__ or "").splitlines():
        start, _, text = line.partition(": ")
        if start in names:
            name = start
            docs[name] = text
        elif name and line.startswith(" "):
            docs[name] += " " + line.strip()
        else:
            name = ""
    return {name: docs.get(name, "").rstrip(".") for name in names}


def _add_options(
    group: argparse._ArgumentGroup, owner: type, prefix: str, exclude: Collection[str], defaults: Mapping[str, str]
) -> None:
    docs = field_docs(owner)
    for field in fields(owner):
        name = field.name
        if accepts(field).has_flag and name not in exclude:
            text = docs[name].replace("None", "unset").replace("%", "%%")
            group.add_argument(
                "--" + name.replace("_", "-"),
                dest=f"{prefix}.{name}",
                default=argparse.SUPPRESS,
                help=f"{text} (default: {defaults[name]})" if defaults.get(name) else text,
                **_parsing(field),
            )


def _parsing(field: "Field[Any]") -> dict[str, Any]:
    """How argparse should read a field."""
    kind = next(kind for kind in kinds_of(field.type) if kind is not NoneType)
    choices = [choice for choice in accepts(field).choices if choice is not None]
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if choices and kind is str:
        return {"choices": choices}
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
        return {"action": "append", "type": kind, "metavar": _METAVARS[kind]}
    if is_dataclass(kind):
        return {"type": _read_object, "metavar": "JSON"}
    return {"type": kind, "metavar": _METAVARS[kind]}


def _read_object(text: str) -> dict[str, Any]:
    """Of options that are several in one, as vLLM's flags take them."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r} ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def _show(default: Any) -> str:
    """A default as the help shows it; nothing where the text itself says what happens without a value."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return "" if default in (MISSING, None) else str(default)


def _given(args: argparse.Namespace, prefix: str) -> dict[str, Any]:
    start = prefix + "."
    return {name.removeprefix(start): value for name, value in vars(args).items() if name.startswith(start)}
