"""/v1/responses as OpenAI's own client sees it."""

import json
from typing import Any, Literal

import pytest

from tests.server import patient
from tests.server.conftest import Running, says

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")
pytest.importorskip("llguidance")
pytest.importorskip("transformers.utils.chat_parsing")
WEATHER = {
    "type": "function",
    "name": "weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"place": {"enum": ["Rome"]}},
        "required": ["place"],
        "additionalProperties": False,
    },
}
CALLING = (
    "<think>\nWell.\n</think>\n\nI look.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'
)
NO_BLANKS = {"logit_bias": {str(ord(blank)): -100 for blank in " \t\r\n"}}


@pytest.fixture
def client(tooled: Running) -> Any:
    return openai.OpenAI(base_url=f"{tooled.url}/v1", api_key="none", max_retries=0)


def test_a_text_in_and_a_text_out(client: Any, tooled: Running) -> None:
    response = client.responses.create(model="tiny", input="Hi", instructions="Be brief", extra_body=says("Hello"))
    assert response.output_text == "Hello" and response.status == "completed" and response.store is False
    assert response.usage.output_tokens == 5 and response.usage.output_tokens_details.reasoning_tokens == 0
    tokenizer = tooled.served.tokenizer
    text = tokenizer.render_chat([{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}])
    assert response.usage.input_tokens == len(tokenizer.encode(text, add_special_tokens=False))


def test_items_whole_and_in_a_stream_are_the_same(client: Any) -> None:
    whole = client.responses.create(model="tiny", input="Hi", tools=[WEATHER], extra_body=says(CALLING))
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call", "function_call"]
    reasoning, message, call, other = whole.output
    assert reasoning.content[0].text == "Well." and message.content[0].text == "I look."
    assert json.loads(call.arguments) == {"place": "Rome"} and call.call_id != other.call_id
    assert whole.usage.output_tokens_details.reasoning_tokens == len("Well.")
    with client.responses.stream(model="tiny", input="Hi", tools=[WEATHER], extra_body=says(CALLING)) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == "response.completed"

    def plain(response: Any) -> Any:
        return [item.model_dump(exclude={"id", "call_id", "content", "parsed_arguments"}) for item in response.output]

    assert plain(final) == plain(whole) and final.output_text == "I look."
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == "I look." and final.usage.output_tokens == whole.usage.output_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut(client: Any, stream: bool) -> None:
    """The client's own helper has the final response."""
    options = {"model": "tiny", "input": "Hi", "max_output_tokens": 3, "extra_body": says("Hello")}
    if stream:
        with client.responses.stream(**options) as running:
            response = running.get_final_response()
    else:
        response = client.responses.create(**options)
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text == "Hel"


def test_a_conversation_goes_on_by_its_items(client: Any, tooled: Running) -> None:
    first = client.responses.create(model="tiny", input="Hi", tools=[WEATHER], extra_body=says(CALLING))
    calls = [item for item in first.output if item.type == "function_call"]
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"} for call in calls]
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}, *first.output, *results]
    second = client.responses.create(model="tiny", input=items, extra_body=says("Go."))
    assert second.output_text == "Go."
    tokenizer = tooled.served.tokenizer
    function = {"name": "weather", "arguments": {"place": "Rome"}}
    turn = {"role": "assistant", "content": "I look.", "tool_calls": [{"function": function}] * 2}
    said = [{"role": "user", "content": "Hi"}, turn, *[{"role": "tool", "content": "Sunny"}] * 2]
    ids = tokenizer.encode(tokenizer.render_chat(said), add_special_tokens=False)
    assert second.usage.input_tokens == len(ids)


def test_a_form_is_parsed_by_the_client(client: Any) -> None:
    class Answer(pydantic.BaseModel):  # type: ignore[misc, name-defined]
        x: Literal["yes", "no"]

    response = client.responses.parse(model="tiny", input="Hi", text_format=Answer, extra_body=NO_BLANKS)
    assert response.output_parsed.x in ("yes", "no")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_forced_calls(client: Any, choice: Any) -> None:
    response = client.responses.create(
        model="tiny", input="Hi", tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, extra_body=NO_BLANKS
    )
    (item,) = response.output
    assert (item.type, item.name, json.loads(item.arguments)) == ("function_call", "weather", {"place": "Rome"})


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "missing"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored"),
        ({"input": "a", "background": True}, "background", "not supported"),
        ({"input": "a", "max_tokens": 3}, "max_tokens", "not supported"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "must be"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, None, "input_image"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
        ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format.schema", "missing"),
    ],
)
def test_what_is_wrong_is_named(tooled: Running, body: dict[str, Any], param: str | None, message: str) -> None:
    answer = patient.post(f"{tooled.url}/v1/responses", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and message in error["message"]
