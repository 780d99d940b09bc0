"""Command-line flags made from the fields of an options dataclass, with the field's own documentation as help.

Owns the mapping field -> flag and back. Invariant: no flag has a default of its own; what is not given on the command
line is not passed on, so the dataclass decides. Imports no torch: help must appear at once.
"""

import argparse
import re
import types
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from nanovllm.config import COMPILATIONS, DTYPES, EXECUTOR_BACKENDS, LOAD_FORMATS, EngineConfig
from nanovllm.sampling_params import SamplingParams

_CHOICES = {
    "dtype": ("auto", *DTYPES),
    "load_format": LOAD_FORMATS,
    "compilation": COMPILATIONS,
    "distributed_executor_backend": EXECUTOR_BACKENDS,
}
_METAVARS = {int: "N", float: "X", str: "NAME"}

# Not among the sampling flags: the engine's --seed makes a run reproducible, the commands print one text for each
# prompt, as it comes, and there are values that no flag can hold.
_NOT_SAMPLING_FLAGS = {
    "n",
    "seed",
    "detokenize",
    "output_kind",
    "logprobs",
    "prompt_logprobs",
    "logit_bias",
    "logits_processors",
    "structured_outputs",
    "capture",
}


def add_engine_options(parser: argparse.ArgumentParser, exclude: Collection[str] = ()) -> None:
    """A flag for each field of EngineConfig except `model`, which each command takes in its own way, and `exclude`."""
    group = parser.add_argument_group("engine options", "the arguments of LLM(...)")
    defaults = {field.name: _show(field.default) for field in fields(EngineConfig)}
    _add_options(group, EngineConfig, "engine", {"model", "logits_processors", *exclude}, defaults)


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: str) -> None:
    """A flag for each field of SamplingParams that matters here. max_tokens: the command's default, in words."""
    group = parser.add_argument_group("sampling options", "by default as the model's generation_config.json says")
    _add_options(group, SamplingParams, "sampling", _NOT_SAMPLING_FLAGS, {"max_tokens": max_tokens})


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The engine options that were given, by field name."""
    return _given(args, "engine")


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given, by field name."""
    return _given(args, "sampling")


def field_docs(owner: type) -> dict[str, str]:
    """What the class docstring says about each field: the text after "name:", or else the sentence that names it."""
    names = [field.name for field in fields(owner)]
    text = re.sub(r"\s+", " ", (owner.__doc__ or "").partition("\n\n")[2]).strip()
    parts = re.split(rf"(?:^|(?<=\s))({'|'.join(names)}): ", text)
    docs = dict(zip(parts[1::2], (part.strip() for part in parts[2::2]), strict=True))
    for name in names:
        if name not in docs:
            sentences = (sentence for sentence in re.split(r"(?<=\.) ", text) if re.search(rf"\b{name}\b", sentence))
            docs[name] = re.sub(r"^\w+: ", "", next(sentences, name.replace("_", " ")))
    return {name: docs[name].rstrip(".") for name in names}


def _add_options(
    group: argparse._ArgumentGroup, owner: type, prefix: str, exclude: Collection[str], defaults: Mapping[str, str]
) -> None:
    hints, docs = get_type_hints(owner), field_docs(owner)
    for name, text in docs.items():
        if name not in exclude:
            text = text.replace("None", "unset").replace("%", "%%")
            group.add_argument(
                "--" + name.replace("_", "-"),
                dest=f"{prefix}.{name}",
                default=argparse.SUPPRESS,
                help=f"{text} (default: {defaults[name]})" if defaults.get(name) else text,
                **_parsing(name, hints[name]),
            )


def _parsing(name: str, hint: Any) -> dict[str, Any]:
    """How argparse should read a field of this type."""
    accepted = [kind for kind in _flatten(hint) if kind is not types.NoneType]
    if accepted == [bool]:
        return {"action": argparse.BooleanOptionalAction}
    if name in _CHOICES:
        return {"choices": _CHOICES[name]}
    items = [get_args(kind)[0] for kind in accepted if get_origin(kind) in (list, tuple)]
    if items:
        return {"action": "append", "type": items[0], "metavar": _METAVARS[items[0]]}
    return {"type": accepted[0], "metavar": _METAVARS[accepted[0]]}


def _flatten(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _show(default: Any) -> str:
    """A default as the help shows it; nothing where the text itself says what happens without a value."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return "" if default in (MISSING, None) else str(default)


def _given(args: argparse.Namespace, prefix: str) -> dict[str, Any]:
    start = prefix + "."
    return {name.removeprefix(start): value for name, value in vars(args).items() if name.startswith(start)}
