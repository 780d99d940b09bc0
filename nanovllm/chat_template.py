"""Conversations become the text of a prompt, by a model's chat template.

Owns what a message may be (vLLM's forms, text alone) and bounds on the time and memory of a template, which is a
program that came with a checkpoint or from a caller. The template's language and its sandbox are transformers'.
Invariant: what is wrong with messages or template is a ValueError or TypeError that names the one or the other.
"""

import ctypes
import json
import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from nanovllm.errors import brief, cut

MAX_TEMPLATE_CHARACTERS = 1_000_000
MAX_TEMPLATE_SECONDS = 10.0
MAX_TEMPLATE_BYTES = 1 << 30
_GENERATION = re.compile(r"{%[-+]?\s*(?:end)?generation\s*[-+]?%}")  # transformers' own tag, which changes no text
_TEXT_PARTS = ("text", "input_text", "output_text")
# What transformers' method takes for other purposes than the template.
_NO_VARIABLES = (
    "conversation",
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
)
OWN_OPTIONS = ("name", "max_seconds", "max_bytes")  # of `render_chat`, for those who call it and not for their clients


def render_chat(
    hf: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    name: str = "messages",
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template: str | None = None,
    max_seconds: float = MAX_TEMPLATE_SECONDS,
    max_bytes: int = MAX_TEMPLATE_BYTES,
    **variables: Any,
) -> str:
    """The text of one conversation; errors call it `name`. hf: the transformers tokenizer.

    tools: JSON schemas of functions, for a template that can tell the model of them. chat_template: Jinja text, or the
    name of one of the model's, in place of the model's own. continue_final_message: the text ends where the last
    message does, and the answer goes on with it. variables: whatever else the template reads.
    """
    for option in _NO_VARIABLES:
        if option in variables:
            raise ValueError(f"{option!r} is no variable of a chat template; leave it out")
    if add_generation_prompt and continue_final_message:
        raise ValueError(
            "continue_final_message=True ends the prompt inside the last message, add_generation_prompt=True begins "
            "another message: set one of them to False"
        )
    if isinstance(tools, (str, Mapping)) or not all(isinstance(tool, Mapping) for tool in tools or ()):
        raise TypeError(f"tools must be a list of dicts like {{'type': 'function', ...}}, got {brief(tools)}")
    template = _find_template(hf, chat_template, tools)

    def guarded(function: Callable[[], Any]) -> Any:
        whose = "the model's chat template" if chat_template is None else "chat_template="
        try:
            return call_within(max_seconds, function, max_bytes)
        except (TimeoutError, MemoryError) as error:
            raise ValueError(f"{name}: {whose} {error} and was stopped; give another one") from None
        except Exception as error:  # a template is a program: it may raise anything
            what = f"{type(error).__name__}: {cut(str(error))}"
            raise ValueError(f"{name} cannot be laid out by {whose}: {what}") from error

    as_parts = guarded(lambda: _reads_parts(template))
    conversation = [_read_message(message, f"{name}[{i}]", as_parts) for i, message in enumerate(messages)]
    text: str = guarded(
        lambda: hf.apply_chat_template(
            conversation,
            tools=[dict(tool) for tool in tools] if tools else None,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **variables,
        )
    )
    if not text:
        raise ValueError(f"{name} cannot be laid out: the chat template made no text of them")
    return text


def _find_template(hf: Any, chat_template: str | None, tools: Sequence[Mapping[str, Any]] | None) -> str:
    if not isinstance(chat_template, (str, type(None))):
        raise TypeError(f"chat_template must be a string, got {type(chat_template).__name__}")
    if hf.chat_template is None and chat_template is None:
        raise ValueError("this model's tokenizer has no chat template: use generate() with a prompt, or chat_template=")
    template: str = hf.get_chat_template(chat_template, tools or None)
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise ValueError(f"the chat template has {len(template)} characters; {MAX_TEMPLATE_CHARACTERS} is the most")
    return template


@lru_cache(16)
def _reads_parts(template: str) -> bool:
    """Whether a template knows a message's content as a list of parts only: it goes through them, and asks of none
    whether it is a string. Every other template reads strings.
    """
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers.utils import chat_template_utils  # noqa: F401 (checks jinja2's version)

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    tree = environment.parse(_GENERATION.sub("", template))
    is_asked = any(test.name == "string" for test in tree.find_all(nodes.Test))
    return not is_asked and any(_is_content(loop.iter) for loop in tree.find_all(nodes.For))


def _is_content(node: Any) -> bool:
    """Is it message.content, or message["content"]?"""
    return getattr(node, "attr", None) == "content" or getattr(getattr(node, "arg", None), "value", None) == "content"


def _read_message(message: Any, name: str, as_parts: bool) -> dict[str, Any]:
    """A copy in the form that templates know. Raises TypeError or ValueError that names what is wrong."""
    if not isinstance(message, Mapping):
        raise TypeError(f"{name} must be a dict like {{'role': 'user', 'content': 'Hi'}}, got {brief(message)}")
    role = message.get("role")
    if not isinstance(role, str):
        raise ValueError(f"{name} needs a 'role', a string like 'user' or 'assistant', got {brief(role)}")
    if message.get("content") is None and role != "assistant":
        raise ValueError(f"{name} has no 'content'; only an assistant's message may lack it, beside tool_calls")
    parts = _read_content(message.get("content"), f'{name}["content"]')
    content = [{"type": "text", "text": text} for text in parts] if as_parts else "\n".join(parts)
    copy = {**message, "content": content}
    if message.get("tool_calls") is not None:
        copy["tool_calls"] = _read_tool_calls(message["tool_calls"], f'{name}["tool_calls"]')
    return copy


def _read_content(content: Any, name: str) -> list[str]:
    """Its texts: a string is one, a list has one in each part, None has none."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, (list, tuple)):
        raise TypeError(f"{name} must be a string or a list of parts, got {brief(content)}")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind not in _TEXT_PARTS:
            raise ValueError(f"{name}[{i}] is of type {brief(kind)}; this engine reads text parts only")
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise TypeError(f"{name}[{i}] must be like {{'type': 'text', 'text': 'Hi'}}, got {brief(part)}")
        texts.append(text)
    return texts


def _read_tool_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """Arguments come as JSON text from clients of a server, and templates want the object."""
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in calls):
        raise TypeError(f"{name} must be a list of dicts, got {brief(calls)}")
    read = []
    for i, call in enumerate(calls):
        function = call.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"] or "{}")
            except (json.JSONDecodeError, RecursionError) as error:
                what = f"{error}: {brief(function['arguments'])}"
                raise ValueError(f'{name}[{i}]["function"]["arguments"] is no JSON ({what})') from None
            call = {**call, "function": {**function, "arguments": arguments}}
        read.append(dict(call))
    return read


class _Stopped(BaseException):
    """Not an Exception: no `except` of a template's runtime takes it."""


def call_within(seconds: float, function: Callable[[], Any], max_bytes: int = MAX_TEMPLATE_BYTES) -> Any:
    """function(), for at most so long and while the process grows by no more; else TimeoutError or MemoryError.

    It runs in a thread of its own, because only in a thread that does nothing else can an exception be raised from
    outside and strike nobody else. It strikes between two bytecodes, so not in the middle of a long C call. Whatever
    grows beside it counts too, so memory is looked at only when the time is longer than that of any common template.
    """
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    limit, deadline = _resident_bytes() + max_bytes, time.monotonic() + seconds
    is_large = False
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive() and not is_large and (left := deadline - time.monotonic()) > 0:
            thread.join(min(0.1, left))
            is_large = thread.is_alive() and _resident_bytes() > limit
    finally:
        if thread.is_alive():  # also when the caller was interrupted while it waited
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Stopped))
    if is_large:
        raise MemoryError(f"used more than {max_bytes >> 20} MiB")
    if not outcome or isinstance(outcome[0][1], _Stopped):
        raise TimeoutError(f"ran for {seconds} s")
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def _resident_bytes() -> int:
    """What the process holds in memory; where the system does not tell, the most that it has held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
