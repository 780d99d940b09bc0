"""Reasoning and tool calls out of text, in every form that the table of templates knows, in pieces of any size."""

import json
import sys
from typing import ClassVar

import pytest

from nanovllm.server import response_templates
from nanovllm.server.growing_calls import GrowingCalls
from nanovllm.server.reply import Piece, Reader, Reply, TemplateReader, read_whole
from nanovllm.server.response_templates import find_response_template

CONTENT_PARSERS = pytest.importorskip("transformers.utils.chat_parsing.content_parsers").CONTENT_PARSERS
TURN = "<|im_start|>assistant\n"
BRACES = {"command": 'mkdir {a,b} && echo "]}"', "n": 3}
TOOL = {
    "type": "function",
    "function": {
        "name": "run",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}, "n": {"type": "integer"}}},
    },
}


class Tokenizer:
    """One without a template of its own."""


def new_reader(
    chat_template: str, prompt: str = TURN, *, tools: bool = True, is_parallel: bool = True, grows: bool = False
) -> Reader:
    template = find_response_template(Tokenizer(), chat_template, tools)
    assert template is not None
    prompt = {HARMONY: "<|start|>assistant", GEMMA4: "<|turn>model\n"}.get(chat_template, prompt)
    return TemplateReader(template, prompt, [TOOL] if tools else [], is_parallel, GrowingCalls if grows else None)


def in_pieces(reader: Reader, text: str, size: int) -> Reply:
    reply = Reply()
    for start in range(0, len(text), size):
        reply.add(reader.feed(text[start : start + size]))
    reply.add(reader.finish())
    return reply


def hermes(name: str, arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


HARMONY, GEMMA4 = "<|channel|>", "<|channel>"
DEEPSEEK = "<\uff5ctool\u2581call\u2581begin\uff5c>"


def deepseek(name: str, arguments: object, older: bool = False) -> str:
    sep, end = DEEPSEEK.replace("call\u2581begin", "sep"), DEEPSEEK.replace("begin", "end")
    if older:
        return f"{DEEPSEEK}function{sep}{name}\n```json\n{json.dumps(arguments)}\n```{end}"
    return f"{DEEPSEEK}{name}{sep}{json.dumps(arguments)}{end}"


FORMS = {
    "<think></think><tool_call>": f"<think>\nWell.\n</think>\n\nI look.\n{hermes('run', BRACES)}\n{hermes('now', {})}",
    "<think><tool_call><function=": (
        "<think>\nWell.\n</think>\n\nI look.\n<tool_call>\n<function=run>\n<parameter=command>\n"
        f"{BRACES['command']}\n</parameter>\n<parameter=n>\n3\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>"
    ),
    "<think>[TOOL_CALLS][ARGS]": (
        f"<think>Well.</think>I look.[TOOL_CALLS]run[ARGS]{json.dumps(BRACES)}[TOOL_CALLS]now[ARGS]{{}}"
    ),
    "<think>[TOOL_CALLS]": "<think>Well.</think>I look.[TOOL_CALLS] "
    + json.dumps([{"name": "run", "arguments": BRACES}, {"name": "now", "arguments": {}}]),
    "<think><|tool_call|>": "<think>Well.</think>I look.<|tool_call|>"
    + json.dumps([{"name": "run", "arguments": BRACES}, {"name": "now", "arguments": {}}]),
    "<think><|tool_list_start|>": (
        "<think>Well.</think>I look.<|tool_call_start|>"
        """[run(command='mkdir {a,b} && echo "]}"', n=3), now()]<|tool_call_end|>"""
    ),
    "<think><arg_key><tool_call>": (
        "\n<think>Well.</think>\nI look.\n<tool_call>run\n<arg_key>command</arg_key>\n"
        f"<arg_value>{BRACES['command']}</arg_value>\n<arg_key>n</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n"
        "<tool_call>now</tool_call>"
    ),
    "<think><TOOLCALL>": "<think>\nWell.\n</think>\n\nI look.\n<TOOLCALL>"
    + json.dumps([{"name": "run", "arguments": BRACES}, {"name": "now", "arguments": {}}])
    + "</TOOLCALL>",
    f"<think>{DEEPSEEK}": f"<think>Well.</think>I look.{deepseek('run', BRACES)}{deepseek('now', {}, older=True)}",
    "<think><|tool_call_begin|>": (
        "<think>Well.</think>I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.run:0"
        f"<|tool_call_argument_begin|>{json.dumps(BRACES)}<|tool_call_end|><|tool_call_begin|>functions.now:1"
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
    ),
    GEMMA4: (
        "<|channel>thought\nWell.\n<channel|>I look."
        f"""<|tool_call>call:run{{command:<|"|>{BRACES["command"]}<|"|>,n:3}}<tool_call|>"""
        "<|tool_call>call:now{}<tool_call|><turn|>"
    ),
    HARMONY: (
        "<|channel|>analysis<|message|>Well.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        f"<|start|>assistant<|channel|>commentary to=functions.run <|constrain|>json<|message|>{json.dumps(BRACES)}"
        "<|call|><|start|>assistant to=functions.now<|channel|>commentary<|message|>{}<|call|>"
    ),
}
_NEW_PARSER = pytest.mark.skipif(
    "python-call-list" not in CONTENT_PARSERS, reason="transformers 5.24 is the first that reads Python calls"
)
EACH_FORM = [pytest.param(form, marks=_NEW_PARSER if "tool_list" in form else ()) for form in FORMS]
_WITHOUT_JSON = (
    *("<think><tool_call><function=", "<think><|tool_list_start|>", "<think><arg_key><tool_call>", GEMMA4),
    "<think><TOOLCALL>",
)


@pytest.mark.parametrize("chat_template", EACH_FORM)
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_reasoning_content_and_two_calls(chat_template: str, size: int) -> None:
    text = FORMS[chat_template]
    for grows in (False, True):
        reply = in_pieces(new_reader(chat_template, grows=grows), text, size)
        assert (reply.reasoning, reply.content) == ("Well.", "I look.")
        assert [(call.name, json.loads(call.arguments)) for call in reply.calls] == [("run", BRACES), ("now", {})]
        assert len({call.id for call in reply.calls}) == 2
    reader = new_reader(chat_template, grows=True)
    pieces = [piece for character in text for piece in reader.feed(character)] + reader.finish()
    num_growing = sum(piece.kind == "arguments" for piece in pieces)
    assert num_growing >= len(json.dumps(BRACES)) - 1 or (chat_template in _WITHOUT_JSON and not num_growing)


def test_a_parser_that_this_transformers_does_not_have_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    response_templates._load.cache_clear()
    monkeypatch.delitem(CONTENT_PARSERS, "python-call-list", raising=False)
    with pytest.raises(NotImplementedError, match=r"parser 'python-call-list'.*install transformers 5\.24 or later"):
        new_reader("<|tool_list_start|>")
    assert find_response_template(Tokenizer(), "<think><|tool_list_start|>", has_tools=False) is not None


def test_a_call_that_is_cut_while_it_grows_is_text_as_well() -> None:
    text = FORMS["<think></think><tool_call>"]
    end = text.index("mkdir")
    reply = in_pieces(new_reader("<think><tool_call>", grows=True), text[:end], 3)
    assert (reply.calls[0].name, reply.calls[0].arguments) == ("run", '{"command": "')
    assert reply.content == text[text.index("I look.") : end]
    for no_call in ('{"name": "run", "n": 3}', '{"arguments": {}, "name": "run"}', "[1]"):
        reply = in_pieces(new_reader("<tool_call>", grows=True), f"<tool_call>{no_call}</tool_call>", 2)
        assert [call.arguments for call in reply.calls] == (["{}"] if "name" in no_call else [])


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize("tag", ["", "<|python_tag|>"])
def test_an_answer_that_is_one_bare_call(size: int, tag: str) -> None:
    prompt = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    text = tag + json.dumps({"name": "run", "parameters": BRACES})
    reply = in_pieces(new_reader("<|python_tag|>", prompt), text, size)
    assert reply.content == "" and json.loads(reply.calls[0].arguments) == BRACES
    said = 'An object: {"name": "run"}'
    assert in_pieces(new_reader("<|python_tag|>", prompt), said, size) == Reply(said)


@pytest.mark.parametrize("chat_template", EACH_FORM)
def test_no_cut_loses_text_or_makes_an_error(chat_template: str) -> None:
    """Wherever an answer ends, what is no whole call is content, as it was written."""
    text = FORMS[chat_template]
    for end in range(len(text)):
        reply = read_whole(new_reader(chat_template), text[:end])
        if chat_template == HARMONY:  # its tags are no text, but for those of a call that is cut
            assert "I look." not in text[:end] or reply.content.startswith("I look.")
            continue
        num_whole = len(reply.calls)
        assert num_whole <= 1 or end > len(text) - 50
        if "I look." in text[:end] and num_whole == 0:
            begun = text[text.index("I look.") : end]
            assert reply.content.replace("\n", "") == begun.replace("\n", "")


def test_what_is_no_call_stays_text() -> None:
    text = "Look: <tool_call>\nnot JSON\n</tool_call> and more"
    for size in (1, 5, 1000):
        assert in_pieces(new_reader("<tool_call>"), text, size).content.split() == text.split()
    for nameless in ("[1]", '{"name": 1}', '{"name": "run", "arguments": [1]}', '{"name": "run", "arguments": "x"}'):
        text = f"<tool_call>{nameless}</tool_call>"
        assert read_whole(new_reader("<tool_call>"), text) == Reply(text)


def test_reasoning_that_the_prompt_has_begun() -> None:
    reader = new_reader("<think>", TURN + "<think>\n", tools=False)
    assert reader.feed("So") == [Piece("reasoning", "So")]
    reply = read_whole(new_reader("<think>", "unknown turn <think>\n", tools=False), "So.\n</think>\n\nYes")
    assert reply == Reply("Yes", "So.")
    ended = TURN + "<think>\n\n</think>\n\n"
    assert read_whole(new_reader("<think>", ended, tools=False), "Yes") == Reply("Yes")


def test_without_tools_calls_are_text() -> None:
    text = hermes("run", {})
    assert read_whole(new_reader("<think><tool_call>", tools=False), text) == Reply(text)
    assert find_response_template(Tokenizer(), "<tool_call>", False) is None


def test_one_call_where_no_more_are_wanted() -> None:
    text = hermes("run", {}) + hermes("now", {})
    for grows in (False, True):
        reply = in_pieces(new_reader("<tool_call>", is_parallel=False, grows=grows), text, 3)
        assert [call.name for call in reply.calls] == ["run"]


def test_a_tokenizers_own_template_comes_first() -> None:
    class Own(Tokenizer):
        response_template: ClassVar = {
            "start_anchor": TURN,
            "fields": {
                "thinking": {"open": "((", "close": "))", "content": "text"},
                "tool_calls": {
                    "open_pattern": r"!(?P<name>\w+) ", "close": "!", "content": "json", "repeats": True,
                    "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
                },
                "content": {"content": "text"},
            },
        }  # fmt: skip

    template = find_response_template(Own(), "<tool_call>", True)
    reply = read_whole(TemplateReader(template, TURN, [], True), '((hm))yes!run {"a": 1}!')
    assert (reply.reasoning, reply.content, reply.calls[0].name) == ("hm", "yes", "run")


def test_an_older_transformers_leaves_text_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.utils.chat_parsing.response_templates", None)
    response_templates._load.cache_clear()
    assert find_response_template(Tokenizer(), "<think>", False) is None
    with pytest.raises(NotImplementedError, match=r"needs transformers 5\.24"):
        find_response_template(Tokenizer(), "<tool_call>", True)
    response_templates._load.cache_clear()


def test_a_form_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match="nobody knows how this model writes tool calls"):
        find_response_template(Tokenizer(), "{{ tools }}", True)
