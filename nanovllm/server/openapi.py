"""/openapi.json: the routes and their fields in the words of OpenAPI 3.1, for clients that are made from it.

Owns the description and no rule: what a field may hold is checked where it is taken (`Body.take`, `SamplingParams`),
whose bounds are read here. Invariant: the fields of a route are those that it takes, of the same kinds; a test compares
them. Of objects inside, and of answers, it says little.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from nanovllm import __version__
from nanovllm.options import accepts
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.sampling import FLAGS, INTEGERS, LISTS, NUMBERS

Kinds = Mapping[str, type | tuple[type, ...]]

_SAMPLING: Kinds = {
    **dict.fromkeys(NUMBERS, float), **dict.fromkeys(INTEGERS, int), **dict.fromkeys(FLAGS, bool),
    **dict.fromkeys(LISTS, list), "stop": (str, list), "logit_bias": dict, "structured_outputs": dict,
    "response_format": dict,
}  # fmt: skip
_TOOLS: Kinds = {"tools": list, "tool_choice": (str, dict), "parallel_tool_calls": bool}
_STREAM: Kinds = {"model": str, "stream": bool, "stream_options": dict}
_TEMPLATE: Kinds = {"chat_template_kwargs": dict}


def _without(kinds: Kinds, *names: str) -> Kinds:
    return {name: kind for name, kind in kinds.items() if name not in names}


_MESSAGES: Kinds = {
    **_without(_SAMPLING, "n", "stop", "response_format"), **_TEMPLATE, "model": str, "tools": list,
    "tool_choice": dict, "stop_sequences": list, "output_config": dict, "thinking": dict, "system": (str, list),
}  # fmt: skip


@dataclass(frozen=True)
class _Operation:
    """required, optional: fields of the body, by the kinds of `Body.take`. answer: the fields that an answer has."""

    summary: str
    required: Kinds
    optional: Kinds
    answer: tuple[str, ...]

    @property
    def is_streamed(self) -> bool:
        return "stream" in self.optional


OPERATIONS = {
    "/v1/chat/completions": _Operation(
        "Answer a conversation, as OpenAI does",
        {"messages": list},
        {
            **_STREAM, **_SAMPLING, **_TOOLS, **_TEMPLATE, "max_completion_tokens": int, "max_tokens": int,
            "logprobs": bool, "top_logprobs": int, "add_generation_prompt": bool, "continue_final_message": bool,
            "chat_template": str,
        },
        ("id", "object", "created", "model", "choices", "usage"),
    ),
    "/v1/completions": _Operation(
        "Continue prompts, or score them, as OpenAI does",
        {"prompt": (str, list)},
        {**_STREAM, **_SAMPLING, "echo": bool, "logprobs": int, "max_tokens": int},
        ("id", "object", "created", "model", "choices", "usage"),
    ),
    "/v1/responses": _Operation(
        "Answer a conversation of items, as OpenAI does; nothing is stored",
        {"input": (str, list)},
        {
            **_STREAM, **_without(_SAMPLING, "n", "response_format"), **_TOOLS, **_TEMPLATE,
            "max_output_tokens": int, "metadata": dict, "instructions": str, "text": dict,
            "reasoning": dict,
        },
        ("id", "object", "created_at", "model", "status", "output", "usage"),
    ),
    "/v1/messages": _Operation(
        "Answer a conversation, as Anthropic does",
        {"messages": list, "max_tokens": int},
        {**_MESSAGES, "stream": bool},
        ("id", "type", "role", "model", "content", "stop_reason", "usage"),
    ),
    "/v1/messages/count_tokens": _Operation(
        "Count the tokens of a conversation, as Anthropic does",
        {"messages": list},
        _MESSAGES,
        ("input_tokens",),
    ),
    "/v1/embeddings": _Operation(
        "A vector for each text, as OpenAI does",
        {"input": (str, list)},
        {"model": str, "encoding_format": str, "pooling": str, "normalize": bool, "dimensions": int},
        ("object", "data", "model", "usage"),
    ),
    **dict.fromkeys(
        ("/score", "/v1/score"),
        _Operation(
            "The log-likelihood of texts behind others, in vLLM's form",
            {"text_1": (str, list), "text_2": (str, list)},
            {"model": str},
            ("id", "object", "data", "model", "usage"),
        ),
    ),
    "/inference/v1/generate": _Operation(
        "Token ids from token ids, as vLLM does",
        {"token_ids": list},
        {**_STREAM, "request_id": str, "sampling_params": dict},
        ("request_id", "choices", "usage"),
    ),
    "/tokenize": _Operation(
        "The token ids of a text, or of the prompt that a conversation becomes",
        {},
        {
            "model": str, "prompt": str, "messages": list, "add_generation_prompt": bool, "add_special_tokens": bool,
            "return_token_strs": bool,
        },
        ("count", "max_model_len", "tokens"),
    ),
    "/detokenize": _Operation("The text of token ids", {"tokens": list}, {"model": str}, ("prompt",)),
}  # fmt: skip
GETS = {
    "/v1/models": ("The names that the model goes by", ("object", "data")),
    "/v1/models/{name}": ("One of them", ("id", "object", "max_model_len")),
    "/health": ("Whether the engine lives", None),
    "/ping": ("Whether the engine lives", None),
    "/version": ("The server's version", ("version",)),
    "/load": ("How many outputs are unfinished", ("server_load",)),
    "/metrics": ("Counters in Prometheus's format", ()),
}
_JSON_TYPES: dict[type, str] = {
    str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"
}  # fmt: skip
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {"role": {"type": "string"}, "content": {"type": ["string", "array", "null"]}},
}
# What a list holds, beside those of which each item may be of several kinds.
_ITEMS: dict[str, dict[str, Any]] = {
    "messages": _MESSAGE,
    **{name: {"type": "object"} for name in ("tools", "system")},
    **{name: {"type": "string"} for name in ("stop", "stop_sequences", "bad_words")},
    **{name: {"type": "integer", "minimum": 0} for name in ("token_ids", "tokens", "stop_token_ids")},
}
_CHOICES = {"encoding_format": ("float", "base64"), "pooling": ("last", "mean")}
_BOUNDS = {field.name: accepts(field) for field in fields(SamplingParams)}


def describe(names: Sequence[str]) -> dict[str, Any]:
    """The document. names: that the model goes by."""
    paths: dict[str, Any] = {path: {"post": _post(operation, names)} for path, operation in OPERATIONS.items()}
    for path, (summary, answer) in GETS.items():
        paths[path] = {"get": {"summary": summary, "responses": {"200": _answer(answer), "default": _ERROR}}}
    paths["/ping"]["post"] = paths["/ping"]["get"]
    paths["/v1/models/{name}"]["parameters"] = [
        {"name": "name", "in": "path", "required": True, "schema": {"enum": list(names)}}
    ]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Nano-vLLM", "version": __version__},
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": _ERROR_BODY},
        },
    }


_ERROR_BODY = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type"]}},
}
_ERROR = {
    "description": "What was wrong, and with which field",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}


def _post(operation: _Operation, names: Sequence[str]) -> dict[str, Any]:
    kinds = {**operation.required, **operation.optional}
    body: dict[str, Any] = {
        "type": "object",
        "required": list(operation.required),
        "additionalProperties": False,
        "properties": {name: _schema(name, kind, name in operation.required) for name, kind in kinds.items()},
    }
    body["properties"]["model"] = {"enum": [*names, None]}
    answer = _answer(operation.answer)
    if operation.is_streamed:
        answer["content"]["text/event-stream"] = {}
    return {
        "summary": operation.summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": answer, "default": _ERROR},
    }


def _schema(name: str, kind: type | tuple[type, ...], is_required: bool) -> dict[str, Any]:
    """Null is the same as no field."""
    types = [_JSON_TYPES[one] for one in (kind if isinstance(kind, tuple) else (kind,))]
    schema: dict[str, Any] = {"type": types if is_required else [*types, "null"]}
    if name in _ITEMS and "array" in types:
        schema["items"] = _ITEMS[name]
    if name in _CHOICES:
        schema["enum"] = [*_CHOICES[name], None]
    if name in _BOUNDS and not {"integer", "number"}.isdisjoint(types):
        limits = _BOUNDS[name]
        named = {"minimum": limits.low, "maximum": limits.high, "exclusiveMinimum": limits.above}
        schema |= {word: limit for word, limit in named.items() if math.isfinite(limit)}
    return schema


def _answer(required: tuple[str, ...] | None) -> dict[str, Any]:
    """required: fields of a JSON object; () for a text, None for nothing."""
    if required is None:
        return {"description": "It does"}
    if not required:
        return {"description": "A text", "content": {"text/plain": {"schema": {"type": "string"}}}}
    schema = {"type": "object", "required": list(required)}
    return {"description": "An answer", "content": {"application/json": {"schema": schema}}}
