"""Tools and reasoning of chat completions, as OpenAI's own client sees them."""

import json
from typing import Any

import pytest

from tests.server import patient
from tests.server.conftest import Running, says

openai = pytest.importorskip("openai")
pytest.importorskip("llguidance")
pytest.importorskip("transformers.utils.chat_parsing")
HI = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"place": {"$ref": "#/$defs/Place"}},
            "required": ["place"],
            "additionalProperties": False,
            "$defs": {"Place": {"enum": ["Rome", "Oslo"]}},
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
NO_BLANKS = {str(ord(blank)): -100 for blank in " \t\r\n"}  # a model without sense would write nothing else
CALLING = (
    "<think>\nWell.\n</think>\n\nI look.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


@pytest.fixture
def client(tooled: Running) -> Any:
    return openai.OpenAI(base_url=f"{tooled.url}/v1", api_key="none", max_retries=0)


def create(client: Any, **options: Any) -> Any:
    return client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=options.pop("max_tokens", 400), temperature=0, **options
    )


def test_calls_and_reasoning_whole(client: Any) -> None:
    (choice,) = create(client, tools=[WEATHER, NOW], extra_body=says(CALLING)).choices
    message = choice.message
    assert choice.finish_reason == "tool_calls" and message.content == "I look."
    assert message.reasoning == message.reasoning_content == "Well."
    first, second = message.tool_calls
    assert first.type == "function" and first.id != second.id
    assert (first.function.name, json.loads(first.function.arguments)) == ("weather", {"place": "Rome"})
    assert (second.function.name, json.loads(second.function.arguments)) == ("now", {})


def test_calls_and_reasoning_in_a_stream(client: Any) -> None:
    """Ids and names come once, and the client's helper puts together what the whole answer has."""
    chunks = list(create(client, tools=[WEATHER, NOW], stream=True, extra_body=says(CALLING)))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "I look."
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == "Well."
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert [(call.index, call.type, call.function.name) for call in calls if call.id] == [
        (0, "function", "weather"), (1, "function", "now"),
    ]  # fmt: skip
    assert not any(call.type or call.function.name for call in calls if not call.id)
    of_weather = [call.function.arguments for call in calls if call.index == 0]
    assert json.loads("".join(of_weather)) == {"place": "Rome"} and len(of_weather) > 5, "they come as they grow"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    with client.chat.completions.stream(
        model="tiny", messages=HI, max_tokens=400, temperature=0, extra_body=says(CALLING),
        tools=[{**WEATHER, "function": {**WEATHER["function"], "strict": True}}],
    ) as stream:  # fmt: skip
        names = [event.name for event in stream if event.type == "tool_calls.function.arguments.done"]
        message = stream.get_final_completion().choices[0].message
    assert names == ["weather", "now"]
    assert json.loads(message.tool_calls[0].function.arguments) == {"place": "Rome"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_is_text(client: Any, stream: bool) -> None:
    calling = CALLING[CALLING.index("<tool_call>") :]
    text = calling[:40]
    answer = create(client, tools=[WEATHER], stream=stream, max_tokens=40, extra_body=says(calling))
    if stream:
        choices = [choice for chunk in answer for choice in chunk.choices]
        assert "".join(choice.delta.content or "" for choice in choices) == text
        assert choices[-1].finish_reason == "length"
    else:
        (choice,) = answer.choices
        assert (choice.message.content, choice.finish_reason) == (text, "length")
        assert choice.message.tool_calls is None


@pytest.mark.parametrize("stream", [False, True])
def test_forced_calls_fit_their_schema_whatever_the_model_is(client: Any, stream: bool) -> None:
    def calls(**options: Any) -> list[Any]:
        answer = create(client, tools=[WEATHER, NOW], stream=stream, logit_bias=NO_BLANKS, **options)
        if not stream:
            assert answer.choices[0].finish_reason == "tool_calls"
            return list(answer.choices[0].message.tool_calls)
        deltas = [call for chunk in answer for choice in chunk.choices for call in choice.delta.tool_calls or []]
        begun = [delta for delta in deltas if delta.id]
        for delta in deltas:
            if not delta.id:
                begun[delta.index].function.arguments += delta.function.arguments
        assert len(deltas) > len(begun)
        return begun

    (named,) = calls(tool_choice={"type": "function", "function": {"name": "weather"}})
    assert named.function.name == "weather" and json.loads(named.function.arguments)["place"] in ("Rome", "Oslo")
    (required,) = calls(tool_choice="required", parallel_tool_calls=False)
    arguments = json.loads(required.function.arguments)
    assert arguments == {} if required.function.name == "now" else arguments["place"] in ("Rome", "Oslo")


def test_a_forced_call_that_is_cut_is_text(client: Any) -> None:
    (choice,) = create(client, tools=[NOW], tool_choice="required", max_tokens=4, logit_bias=NO_BLANKS).choices
    assert choice.finish_reason == "length" and len(choice.message.content) == 4 and not choice.message.tool_calls


def test_a_conversation_with_calls_and_results_goes_on(client: Any, tooled: Running) -> None:
    message = create(client, tools=[NOW], extra_body=says(CALLING)).choices[0].message
    messages = [*HI, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Sunny"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, tools=[NOW], extra_body=says("Good."))
    assert answer.choices[0].message.content == "Good." and answer.choices[0].finish_reason == "stop"


def test_with_no_tool_to_call_it_is_text(client: Any) -> None:
    text = CALLING[CALLING.index("<tool_call>") :]
    without: list[dict[str, Any]] = [{}, {"tools": [NOW], "tool_choice": "none"}]
    for options in without:
        (choice,) = create(client, extra_body=says(text), **options).choices
        assert choice.message.content == text and choice.finish_reason == "stop"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"tools": [NOW, NOW]}, "tools", "twice"),
        ({"tools": ["now"]}, "tools[0]", "must be an object"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "missing"),
        ({"tools": [NOW], "tool_choice": "any"}, "tool_choice", "'required'"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        (
            {"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "then"}}},
            "tool_choice", "names 'then'",
        ),
        (
            {"tools": [NOW], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice", "a form of its own",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_tools_is_named(tooled: Running, body: dict[str, Any], param: str, message: str) -> None:
    answer = patient.post(f"{tooled.url}/v1/chat/completions", json={"messages": HI, **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param and message in answer.json()["error"]["message"]


def test_a_model_that_knows_no_tools_is_given_none(server: Running) -> None:
    for choice in ("auto", "required"):
        body = {"messages": HI, "tools": [NOW], "tool_choice": choice}
        answer = patient.post(f"{server.url}/v1/chat/completions", json=body)
        assert answer.status_code == 400 and "chat template knows no tools" in answer.json()["error"]["message"]
