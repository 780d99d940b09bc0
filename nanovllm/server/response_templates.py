"""How models write reasoning and tool calls: the response template that reads a model's answers.

Owns the choice. A tokenizer's own `response_template` (transformers' format) comes first; else one of those below is
chosen by marks in the chat template, which teaches the model the form that it shall answer in. Invariant: whoever
offers no tools has no calls read: such text stays text.
"""

import json
from functools import lru_cache
from typing import Any

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
# Where an assistant's turn begins, for all of the templates below: what a prompt has behind it belongs to the answer.
_TURNS = [
    "<|im_start|>assistant\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|Assistant|>",
    "<\uff5cAssistant\uff5c>",  # DeepSeek
    "<|assistant|>",  # GLM
    "<|im_assistant|>assistant<|im_middle|>",  # Kimi
    "<|start_of_role|>assistant<|end_of_role|>",  # Granite
    "<SPECIAL_11>Assistant\n",  # Nemotron Nano 2
    "<seed:bos>assistant\n",
    "[/INST]",
]
_MARKS_OF_DEEPSEEK = ("calls begin", "calls end", "call begin", "call end", "sep")
_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_REASONING = {
    "open_pattern": r"\s*<(?:seed:)?think>\s*",
    "close_pattern": r"\s*</(?:seed:)?think>\s*",
    "content": "text",
}
# White space before a call belongs to neither the text before it nor the call.
_EACH_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}}
_DEEPSEEK = {name: f"<\uff5ctool\u2581{name.replace(' ', chr(0x2581))}\uff5c>" for name in _MARKS_OF_DEEPSEEK}
_TOOL_CALLS: dict[str, dict[str, Any]] = {
    "argument tags": {  # GLM 4.5 to 4.7
        "open_pattern": r"\s*<tool_call>\s*(?P<name>[^<\s]+)\s*(?=<)",
        "close_pattern": r"\s*</tool_call>\s*",
        "content": "xml-inline",
        "content_args": {
            "tag_pattern": r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>",
        },
        "transform": _CALL,
        "repeats": True,
    },
    "function tags": {  # Qwen3-Coder, Qwen 3.5, Nemotron 3, Seed-OSS
        "open_pattern": r"\s*<(?:seed:)?tool_call>\s*<function=(?P<name>[^>\n]+)>",
        "close_pattern": r"</function>\s*</(?:seed:)?tool_call>\s*",
        "content": "xml-inline",
        "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"},
        "transform": _CALL,
        "repeats": True,
    },
    "JSON behind a separator": {  # DeepSeek-V3.1; V3 and R1 have it in a block of code
        "open_pattern": rf"\s*(?:{_DEEPSEEK['calls begin']})?\s*{_DEEPSEEK['call begin']}"
        rf"(?:function{_DEEPSEEK['sep']})?(?P<name>(?!function{_DEEPSEEK['sep']})[^<\n]+)(?:{_DEEPSEEK['sep']}|\n```json\n)",
        "close_pattern": rf"(?:\n```)?{_DEEPSEEK['call end']}\s*",
        "content": "json",
        "transform": _CALL,
        "repeats": True,
    },
    "numbered JSON": {  # Kimi
        "open_pattern": r"\s*(?:<\|tool_calls_section_begin\|>)?\s*<\|tool_call_begin\|>\s*"
        r"(?:functions\.)?(?P<name>[\w.-]+):\d+\s*<\|tool_call_argument_begin\|>",
        "close_pattern": r"<\|tool_call_end\|>\s*",
        "content": "json",
        "transform": _CALL,
        "repeats": True,
    },
    "tagged JSON": {  # Hermes, Qwen 2.5 and 3, Granite 4
        "open_pattern": r"\s*<tool_call>",
        "close_pattern": r"</tool_call>\s*",
        "content": "json",
        "transform": {"type": "function", "function": "{content}"},
        "repeats": True,
    },
    "named JSON": {  # Mistral since 2025
        "open_pattern": r"\s*\[TOOL_CALLS\](?P<name>[^\[{\s]+)(?:\[CALL_ID\][^\[]*)?\[ARGS\]",
        "close_pattern": r"(?=\[TOOL_CALLS\])",
        "content": "json",
        "transform": _CALL,
        "repeats": True,
    },
    "a list of JSON": {  # Mistral before
        "open_pattern": r"\s*\[TOOL_CALLS\]\s*",
        "content": "json",
        "transform": _EACH_CALL,
        "transform_each": True,
    },
    "a tagged list of JSON": {  # Nemotron Nano 2
        "open_pattern": r"\s*<TOOLCALL>\s*",
        "close_pattern": r"</TOOLCALL>\s*",
        "content": "json",
        "transform": _EACH_CALL,
        "transform_each": True,
    },
    "a marked list of JSON": {  # Granite 3
        "open_pattern": r"\s*(?:<\|tool_call\|>|<tool_call>)\s*",
        "content": "json",
        "transform": _EACH_CALL,
        "transform_each": True,
    },
    "Python calls": {  # LFM2
        "open_pattern": r"\s*<\|tool_call_start\|>\s*",
        "close_pattern": r"\s*<\|tool_call_end\|>\s*",
        "content": "python-call-list",
        "transform": _EACH_CALL,
        "transform_each": True,
        "repeats": True,
    },
    "bare JSON": {  # Llama 3.x: the whole answer is one call
        "open_pattern": r"\A\s*(?:<\|python_tag\|>)?(?=\{\s*\"name\")",
        "content": "json",
        "transform": {"type": "function", "function": "{content}"},
    },
}
# What closes a list of calls that are tagged one by one; text, for a parser that knows the single ones.
_ENDS_OF_CALLS = {
    "JSON behind a separator": _DEEPSEEK["calls end"],
    "numbered JSON": r"<\|tool_calls_section_end\|>",
}
_TO_FUNCTION = r" to=functions\.(?P<name>[\w.-]+)"
_HARMONY = {  # gpt-oss: every part has a channel, and a call whom it goes to, ahead of the channel or behind it
    "start_anchor": "<|start|>assistant",
    "fields": {
        "reasoning_content": {
            "open_pattern": r"<\|channel\|>analysis<\|message\|>",
            "close_pattern": r"<\|end\|>(?:<\|start\|>assistant(?=<))?",
            "content": "text",
        },
        "tool_calls": {
            "open_pattern": r"(?:<\|start\|>assistant)?"
            rf"(?:<\|channel\|>\w+{_TO_FUNCTION}|{_TO_FUNCTION}<\|channel\|>\w+)"
            r"[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>",
            "close_pattern": r"<\|call\|>",
            "content": "json",
            "transform": _CALL,
            "repeats": True,
        },
        "content": {
            "open_pattern": r"<\|channel\|>(?:final|commentary)(?: ?<\|constrain\|>[^<]*)?<\|message\|>",
            "close_pattern": r"<\|(?:end|return)\|>",
            "content": "text",
        },
    },
}
_GEMMA4 = {
    "start_anchor": ["<|turn>model\n", "<tool_response|>"],
    "fields": {
        "reasoning_content": {
            "open_pattern": r"<\|channel>thought\n\s*",
            "close_pattern": r"\s*<channel\|>",
            "content": "text",
        },
        "tool_calls": {
            "open_pattern": r"\s*<\|tool_call>call:(?P<name>[\w.-]+)",
            "close_pattern": r"<tool_call\|>",
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
            "transform": _CALL,
            "repeats": True,
        },
        "content": {"close_pattern": r"<turn\|>|<\|tool_response>|<eos>", "content": "text"},
    },
}
_WITH_CHANNELS = {"<|channel|>": _HARMONY, "<|channel>": _GEMMA4}
_MARKS = {
    "<arg_key>": "argument tags",
    "<TOOLCALL>": "a tagged list of JSON",
    _DEEPSEEK["call begin"]: "JSON behind a separator",
    "<|tool_call_begin|>": "numbered JSON",
    "<|tool_call|>": "a marked list of JSON",
    "<|tool_call_start|>": "Python calls",
    "<|tool_list_start|>": "Python calls",
    "List of tools: [": "Python calls",  # LFM2.5
    "<function=": "function tags",
    "<tool_call>": "tagged JSON",
    "[ARGS]": "named JSON",
    "[TOOL_CALLS]": "a list of JSON",
    "<|python_tag|>": "bare JSON",
    '"parameters": dictionary': "bare JSON",
}


def find_response_template(hf: Any, chat_template: str, has_tools: bool) -> Any | None:
    """The transformers ResponseTemplate for answers to a conversation laid out by `chat_template`.

    None where an answer is text and nothing else. Raises ValueError if tools are offered and nothing can read calls.
    """
    own = getattr(hf, "response_template", None)
    if own is None:
        own = next((parts for mark, parts in _WITH_CHANNELS.items() if mark in chat_template), None)
    if own is None:
        kind = next((kind for mark, kind in _MARKS.items() if mark in chat_template), None) if has_tools else None
        if has_tools and kind is None:
            raise ValueError("nobody knows how this model writes tool calls; use tool_choice 'required' or a name")
        fields = {"reasoning_content": _REASONING} if "think>" in chat_template else {}
        content = {"content": "text"}
        if kind is not None:
            fields["tool_calls"] = _TOOL_CALLS[kind]
            if (end := _ENDS_OF_CALLS.get(kind)) is not None:
                content["close_pattern"] = end
        own = {"start_anchor": _TURNS, "fields": {**fields, "content": content}}
    elif has_tools and "tool_calls" not in own.get("fields", {}):
        raise ValueError("this model's response template reads no tool calls; use tool_choice 'required' or a name")
    return _load(json.dumps(own), has_tools)


@lru_cache(16)
def _load(text: str, has_tools: bool) -> Any | None:
    spec = json.loads(text)
    spec["fields"] = {name: field for name, field in spec["fields"].items() if has_tools or name != "tool_calls"}
    if not has_tools and not any(name in spec["fields"] for name in REASONING_FIELDS):
        return None
    try:
        import transformers
        from transformers.utils.chat_parsing.content_parsers import CONTENT_PARSERS
        from transformers.utils.chat_parsing.response_templates import load_response_template
    except ImportError as error:
        if not has_tools:
            return None  # nobody asked for anything: what the model thinks stays where it wrote it
        raise NotImplementedError(f"reading tool calls needs transformers 5.24 or later ({error})") from error
    for field in spec["fields"].values():
        if (parser := field.get("content", "text")) not in CONTENT_PARSERS:
            newer = "transformers 5.24 or later" if parser == "python-call-list" else "a later transformers"
            raise NotImplementedError(
                f"reading this model's answers needs the parser {parser!r}, which the installed transformers "
                f"{transformers.__version__} does not have: install {newer}"
            )
    return load_response_template(spec)
