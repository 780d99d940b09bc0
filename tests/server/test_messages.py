"""Anthropic's routes as its own client sees them."""

import json
from typing import Any

import pytest

from tests.server import patient
from tests.server.conftest import Running, says

anthropic = pytest.importorskip("anthropic")
pytest.importorskip("llguidance")
pytest.importorskip("transformers.utils.chat_parsing")
HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"place": {"enum": ["Rome"]}}, "required": ["place"]}
WEATHER = {"name": "weather", "description": "Of a place", "input_schema": SCHEMA}
CALLING = (
    "<think>\nWell.\n</think>\n\nI look.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
)


@pytest.fixture
def client(tooled: Running) -> Any:
    return anthropic.Anthropic(base_url=tooled.url, api_key="none", max_retries=0)


def create(client: Any, **options: Any) -> Any:
    return client.messages.create(**{"model": "tiny", "messages": HI, "max_tokens": 400, **options})


def test_a_message_and_its_tokens(client: Any, tooled: Running) -> None:
    message = create(client, max_tokens=5, system="Be brief", extra_body=says("Hello"))
    assert message.type == "message" and message.role == "assistant" and message.model == "tiny"
    assert [block.text for block in message.content] == ["Hello"] and message.usage.output_tokens == 5
    counted = client.messages.count_tokens(model="tiny", messages=HI, system=[{"type": "text", "text": "Be brief"}])
    assert counted.input_tokens == message.usage.input_tokens + message.usage.cache_read_input_tokens
    tokenizer = tooled.served.tokenizer
    text = tokenizer.render_chat([{"role": "system", "content": "Be brief"}, *HI])
    assert counted.input_tokens == len(tokenizer.encode(text, add_special_tokens=False))


def test_what_ends_a_message(client: Any) -> None:
    assert create(client, extra_body=says("Hello")).stop_reason == "end_turn"
    assert create(client, max_tokens=3, extra_body=says("Hello")).stop_reason == "max_tokens"
    stopped = create(client, stop_sequences=["lo"], extra_body=says("Hello"))
    assert (stopped.stop_reason, stopped.stop_sequence, stopped.content[0].text) == ("stop_sequence", "lo", "Hel")


def test_blocks_whole_and_in_a_stream_are_the_same(client: Any) -> None:
    whole = create(client, tools=[WEATHER], extra_body=says(CALLING))
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use", "tool_use"]
    thinking, text, first, second = whole.content
    assert (thinking.thinking, text.text) == ("Well.", "I look.")
    assert (first.name, first.input, second.input) == ("weather", {"place": "Rome"}, {})
    assert whole.stop_reason == "tool_use"
    with client.messages.stream(
        model="tiny", messages=HI, max_tokens=400, tools=[WEATHER], extra_body=says(CALLING)
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4

    def plain(message: Any) -> Any:
        return [block.model_dump(exclude={"id", "parsed_output"}) for block in message.content]

    assert plain(final) == plain(whole) and final.stop_reason == "tool_use"
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_forced_calls(client: Any) -> None:
    no_blanks = {"logit_bias": {str(ord(blank)): -100 for blank in " \t\r\n"}}
    choices: list[dict[str, Any]] = [
        {"type": "any", "disable_parallel_tool_use": True},
        {"type": "tool", "name": "weather"},
    ]
    strict = {**WEATHER, "input_schema": {**SCHEMA, "additionalProperties": False}}
    for choice in choices:
        (block,) = create(client, tools=[strict], tool_choice=choice, extra_body=no_blanks).content
        assert (block.type, block.name, block.input) == ("tool_use", "weather", {"place": "Rome"})


def test_a_conversation_with_calls_and_results_goes_on(client: Any, tooled: Running) -> None:
    content = create(client, tools=[WEATHER], extra_body=says(CALLING)).content
    uses = [block for block in content if block.type == "tool_use"]
    results = [{"type": "tool_result", "tool_use_id": use.id, "content": "Sunny"} for use in uses]
    messages = [
        *HI, {"role": "assistant", "content": content},
        {"role": "user", "content": [*results, {"type": "text", "text": "And?"}]},
    ]  # fmt: skip
    assert create(client, messages=messages, tools=[WEATHER], extra_body=says("Go.")).content[0].text == "Go."
    begun = [*HI, {"role": "assistant", "content": "It is"}]
    counted = client.messages.count_tokens(model="tiny", messages=begun).input_tokens
    tokenizer = tooled.served.tokenizer
    text = tokenizer.render_chat(begun, continue_final_message=True, add_generation_prompt=False)
    assert text.endswith("It is") and counted == len(tokenizer.encode(text, add_special_tokens=False))


def test_a_form(client: Any) -> None:
    form = {"type": "json_schema", "schema": {"enum": [17]}}
    assert json.loads(create(client, extra_body={"output_config": {"format": form}}).content[0].text) == 17


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "max_tokens is missing"),
        ({"max_tokens": 5, "temprature": 1}, "did you mean 'temperature'"),
        ({"max_tokens": 5, "stop": ["a"]}, "stop_sequences"),
        ({"max_tokens": 5, "n": 2}, "n is not supported"),
        ({"max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "image"}]}]}, "[0].content[0].type must"),
        ({"max_tokens": 5, "messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"max_tokens": 5, "tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools[0].type"),
        ({"max_tokens": 5, "tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"max_tokens": 5, "tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "names 'x'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_in_the_dialect(tooled: Running, body: dict[str, Any], message: str) -> None:
    answer = patient.post(f"{tooled.url}/v1/messages", json={"messages": HI, **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()
    assert error["type"] == "error" and error["error"]["type"] == "invalid_request_error"
    assert message in error["error"]["message"]


def test_other_errors_are_the_clients_own(client: Any) -> None:
    with pytest.raises(anthropic.NotFoundError, match="'other' is not served here"):
        create(client, model="other")
