"""Messages and templates: what is taken, and what an error names."""

import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nanovllm.chat_template import MAX_TEMPLATE_CHARACTERS, call_within
from nanovllm.model_files.tokenizer_files import load_tokenizer
from nanovllm.tokenizer import Tokenizer
from tests.tiny_models import save_tokenizer

HI = {"role": "user", "content": "Hi"}
PARTS = "{% for m in messages %}{% for part in m['content'] %}[{{ part['text'] }}]{% endfor %}{% endfor %}"
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}" + PARTS + "{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return load_tokenizer(str(folder), revision=None)


def test_the_text_is_that_of_transformers(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, HI]
    text = tokenizer.render_chat(messages)
    assert text == tokenizer.hf.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.apply_chat_template(messages) == tokenizer.hf(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_content_in_parts_is_joined_by_lines(tokenizer: Tokenizer, kind: str) -> None:
    parts = {"role": "user", "content": [{"type": kind, "text": "a"}, "b"]}
    assert tokenizer.render_chat([parts]) == tokenizer.render_chat([{"role": "user", "content": "a\nb"}])


def test_a_template_that_knows_parts_only_gets_parts(tokenizer: Tokenizer) -> None:
    two = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    for template, expected in ((PARTS, "[Hi][a][b]"), (EITHER, "Hia\nb")):
        assert tokenizer.render_chat([HI, two], chat_template=template) == expected


def test_an_assistant_may_only_call_tools(tokenizer: Tokenizer) -> None:
    """Arguments arrive as JSON text, and templates read the object."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "2"}], "tool_call_id": "1"},
    ]
    template = (
        "{% for m in messages %}{{ m.role }}={{ m.content }}{{ m.tool_call_id }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.arguments.x + 1 }}{% endfor %};{% endfor %}"
        "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    )
    tools = [{"type": "function", "function": {"name": "f"}}]
    text = tokenizer.render_chat(messages, chat_template=template, tools=tools)
    assert text == "user=Hi;assistant=2;tool=21;f"
    assert messages[1]["tool_calls"] == [call], "the caller's messages stay as they are"
    assert tokenizer.render_chat(messages[:1], chat_template=template) == "user=Hi;"


def test_the_answer_can_go_on_with_the_last_message(tokenizer: Tokenizer) -> None:
    begun = [HI, {"role": "assistant", "content": "Sure, the"}]
    text = tokenizer.render_chat(begun, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nSure, the")
    with pytest.raises(ValueError, match=r"continue_final_message=True.*set one of them to False"):
        tokenizer.render_chat(begun, continue_final_message=True)


@pytest.mark.parametrize(
    ("message", "error", "words"),
    [
        ("hi", TypeError, r"messages\[1\] must be a dict"),
        ({"content": "a"}, ValueError, r"messages\[1\] needs a 'role'"),
        ({"role": 3, "content": "a"}, ValueError, r"messages\[1\] needs a 'role'.*got 3"),
        ({"role": "user"}, ValueError, r"messages\[1\] has no 'content'"),
        ({"role": "user", "content": None}, ValueError, r"messages\[1\] has no 'content'"),
        ({"role": "user", "content": 3}, TypeError, r"messages\[1\]\[\"content\"\] must be a string or .*got 3"),
        (
            {"role": "user", "content": ["a", {"type": "image_url", "image_url": {}}]},
            ValueError,
            r"messages\[1\]\[\"content\"\]\[1\] is of type 'image_url'.*text parts only",
        ),
        (
            {"role": "user", "content": [{"type": "text"}]},
            TypeError,
            r"messages\[1\]\[\"content\"\]\[0\] must be like",
        ),
        ({"role": "assistant", "tool_calls": "f"}, TypeError, r"messages\[1\]\[\"tool_calls\"\] must be a list"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            ValueError,
            r"messages\[1\]\[\"tool_calls\"\]\[0\]\[\"function\"\]\[\"arguments\"\] is no JSON",
        ),
    ],
)
def test_a_bad_message_is_named(tokenizer: Tokenizer, message: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        tokenizer.render_chat([HI, message])
    with pytest.raises(error, match=words.replace("messages", r"messages\[4\]", 1)):
        tokenizer.render_chat([HI, message], name="messages[4]")


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 1 // 0 }}",
        "{{ messages[9]['role'] + 'a' }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
    ids=["syntax", "raises", "escapes", "divides", "undefined", "recursion", "deep"],
)
def test_whatever_a_template_raises_names_the_template(tokenizer: Tokenizer, template: str) -> None:
    with pytest.raises(ValueError, match=r"messages cannot be laid out by chat_template=: \w+:") as caught:
        tokenizer.render_chat([HI], chat_template=template)
    assert len(str(caught.value)) < 600


def test_a_template_that_makes_nothing_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="messages cannot be laid out: the chat template made no text"):
        tokenizer.render_chat([HI], chat_template="{{ ''.__class__ }}")


def test_a_template_cannot_run_for_ever(tokenizer: Tokenizer) -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i * j %}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match=r"messages: chat_template= ran for 0.2 s and was stopped"):
        tokenizer.render_chat([HI], chat_template=loop, max_seconds=0.2)


def test_a_template_cannot_take_all_memory(tokenizer: Tokenizer) -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}" + "a" * 1000 + "{{ j }}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match=r"messages: chat_template= used more than 32 MiB and was stopped"):
        tokenizer.render_chat([HI], chat_template=loop, max_seconds=600, max_bytes=32 << 20)


def test_other_bounds_of_templates(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="1000000 is the most"):
        tokenizer.render_chat([HI], chat_template="a" * (MAX_TEMPLATE_CHARACTERS + 1))
    with pytest.raises(TypeError, match="chat_template must be a string"):
        tokenizer.render_chat([HI], chat_template=Path("a"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tools must be a list of dicts"):
        tokenizer.render_chat([HI], tools=["f"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="'tokenize' is no variable of a chat template"):
        tokenizer.render_chat([HI], tokenize=True)


def test_what_runs_within_a_limit_is_what_runs_without() -> None:
    assert call_within(60, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        call_within(60, lambda: 1 // 0)
    with pytest.raises(SystemExit):
        call_within(60, lambda: sys.exit(3))


def test_what_is_stopped_has_ended() -> None:
    counts = []

    def count() -> None:
        while True:
            counts.append(time.perf_counter())

    with pytest.raises(TimeoutError):
        call_within(0.05, count)
    deadline = time.monotonic() + 30  # a guard, not a measurement
    while time.monotonic() < deadline:
        before = len(counts)
        time.sleep(0.05)
        if len(counts) == before:
            return
    pytest.fail("it still runs")


def test_messages_about_long_things_are_short(tokenizer: Tokenizer) -> None:
    with pytest.raises(TypeError) as caught:
        tokenizer.render_chat([{"role": "user", "content": [{"type": "text", "text": ["x" * 100_000]}]}])
    assert len(str(caught.value)) < 400
    assert re.search(r"\([\d,]+ characters\)", str(caught.value))


def test_the_tag_of_what_is_generated_changes_no_text(tokenizer: Tokenizer) -> None:
    """However white space around it is cut: LFM2.5's template has {%- generation -%}."""
    for begin, end in (("{% generation %}", "{% endgeneration %}"), ("{%- generation -%}", "{%- endgeneration -%}")):
        template = f"{{% for m in messages %}}{begin}{{{{ m.content }}}}{end}{{% endfor %}}"
        text = tokenizer.render_chat([{"role": "user", "content": "Hi"}], chat_template=template)
        assert text == "Hi"
