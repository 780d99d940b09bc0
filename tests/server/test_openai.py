"""The server as OpenAI's own client sees it, and its errors as any client does."""

import json
import time
from typing import Any

import httpx
import pytest

from tests.server import patient
from tests.server.conftest import Running
from tests.tiny_models import edit_json, save_scripted

openai = pytest.importorskip("openai")
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client(server: Running) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_a_chat_completion_whole(client: Any, server: Running) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HI, max_completion_tokens=12, temperature=0)
    assert answer.object == "chat.completion" and answer.model == "tiny"
    (choice,) = answer.choices
    assert choice.message.content == "abcdefghabcd" and choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    text = server.served.tokenizer.render_chat(HI)
    assert answer.usage.prompt_tokens == len(server.served.tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("n", [1, 3])
def test_a_streamed_chat_completion_adds_up(client: Any, n: int) -> None:
    """Opening chunks in order, then text, reasons, and usage when it is asked for."""
    chunks = list(
        client.chat.completions.create(
            model="alias", messages=HI, max_tokens=20, n=n, stream=True, stream_options={"include_usage": True}, seed=1
        )
    )
    assert [chunk.choices[0].index for chunk in chunks[:n]] == list(range(n))
    assert all(chunk.choices[0].delta.role == "assistant" for chunk in chunks[:n])
    texts, reasons = [""] * n, [None] * n
    for chunk in chunks[n:-1]:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    whole = client.chat.completions.create(model="tiny", messages=HI, max_tokens=20, n=n, seed=1)
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == ["length"] * n
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 20 * n


def test_the_clients_own_stream_helper_and_log_probabilities(client: Any) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=HI, max_tokens=60, stop="g", temperature=0, logprobs=True, top_logprobs=2
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    (choice,) = final.choices
    assert choice.message.content == "abcdef"
    assert [entry.token for entry in choice.logprobs.content] == list("abcdefg")
    assert [entry.top_logprobs[0].token for entry in choice.logprobs.content] == list("abcdefg")
    assert {len(entry.top_logprobs) for entry in choice.logprobs.content} == {2}


def test_completions_with_several_prompts_echo_and_log_probabilities(client: Any, server: Running) -> None:
    answer = client.completions.create(
        model="tiny", prompt=["ab", "xy"], max_tokens=3, temperature=0, logprobs=1, echo=True
    )
    assert [choice.text for choice in answer.choices] == ["abcde", "xyabc"]
    (first, _) = answer.choices
    assert first.logprobs.token_logprobs[0] is None and len(first.logprobs.tokens) == 6  # BOS before the prompt
    ids = server.served.tokenizer.encode("ab")
    scored = server.engine.llm.score(ids[:-1], [ids[-1:]])
    only = client.completions.create(model="tiny", prompt=ids, max_tokens=0, logprobs=1, echo=True)
    assert only.choices[0].text == server.served.tokenizer.decode(ids)
    assert only.choices[0].logprobs.token_logprobs[-1] == pytest.approx(scored[0], abs=1e-4)
    assert only.usage.completion_tokens == 0


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_a_stream_with_its_prompts_adds_up_to_the_whole(client: Any, max_tokens: int) -> None:
    asked = {"model": "tiny", "prompt": ["ab", [120, 121]], "max_tokens": max_tokens, "echo": True, "logprobs": 1}
    whole = client.completions.create(**asked, temperature=0)
    texts, tokens, offsets = ["", ""], [[], []], [[], []]  # type: ignore[var-annotated]
    for chunk in client.completions.create(**asked, temperature=0, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            offsets[choice.index] += choice.logprobs.text_offset
    assert texts == [choice.text for choice in whole.choices] and texts[1].startswith("xy")
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]


def test_a_streamed_completion_of_several_prompts(client: Any) -> None:
    texts = {0: "", 1: ""}
    for chunk in client.completions.create(model="tiny", prompt=["a", "d"], max_tokens=9, temperature=0, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {0: "bcdefghab", 1: "efghabcde"}


def test_forms_are_kept_to(client: Any) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
    answer = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=200, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        logit_bias={str(ord(space)): -100 for space in " \t\r\n"},
    )  # fmt: skip
    assert json.loads(answer.choices[0].message.content)["x"] in (1, 2)
    assert answer.choices[0].finish_reason == "stop"
    chosen = client.completions.create(
        model="tiny", prompt="a", max_tokens=20, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )
    assert chosen.choices[0].text in ("yes", "no")


def test_models_tokenize_and_back(client: Any, server: Running) -> None:
    assert [card.id for card in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").max_model_len == 20_000
    tokens = patient.post(f"{server.url}/tokenize", json={"prompt": "héllo"}).json()
    assert tokens["count"] == len(tokens["tokens"]) == 7
    back = patient.post(f"{server.url}/detokenize", json={"tokens": tokens["tokens"][1:]}).json()
    assert back == {"prompt": "héllo"}
    assert patient.post(f"{server.url}/detokenize", json={"tokens": [True]}).status_code == 400
    chat = patient.post(f"{server.url}/tokenize", json={"messages": HI}).json()
    assert chat["count"] > 2


@pytest.mark.parametrize(
    ("route", "body", "param", "message"),
    [
        ("chat/completions", {"messages": HI, "temprature": 1}, "temprature", "did you mean 'temperature'"),
        ("chat/completions", {}, "messages", "messages is missing"),
        ("chat/completions", {"messages": HI, "temperature": "hot"}, "temperature", "must be a number"),
        ("chat/completions", {"messages": HI, "temperature": -1}, None, "temperature"),
        ("chat/completions", {"messages": HI, "tools": [{"type": "function"}]}, "tools[0].function", "missing"),
        ("chat/completions", {"messages": [{"role": "user"}]}, None, "messages"),
        ("chat/completions", {"messages": HI, "response_format": {"type": "xml"}}, "response_format.type", "must be"),
        ("completions", {"prompt": []}, "prompt", "0 prompts"),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ("completions", {"prompt": [1, 99_999]}, None, "99999"),
        ("completions", {"prompt": "a", "best_of": 4}, "best_of", "not supported"),
        ("chat/completions", {"messages": HI, "priority": 3}, "priority", "order in which they came"),
    ],
)
def test_what_is_wrong_is_named(
    server: Running, route: str, body: dict[str, Any], param: str | None, message: str
) -> None:
    for stream in (False, True):
        answer = patient.post(f"{server.url}/v1/{route}", json={**body, "stream": stream})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == param and message in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400), (b"[]", 400), (b'{"messages": NaN}', 400), (b"\xff\xfe", 400),
        (b'{"a": ' * 5000 + b"1" + b"}" * 5000, 400), (b"[" * 100_000, 400), (b"[" + b"[]," * 4_000_000 + b"1]", 413),
        (b'{"prompt": "' + b"a" * (33 * 2**20) + b'"}', 413),
    ],
)  # fmt: skip
def test_bodies_that_are_none(server: Running, body: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers, timeout=30)
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_other_models_and_paths(client: Any, server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served here"):
        client.chat.completions.create(model="gpt-9", messages=HI)
    assert patient.get(f"{server.url}/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert "no /rerank here" in patient.post(f"{server.url}/rerank", json={}).json()["error"]["message"]
    assert patient.get(f"{server.url}/v1/completions").status_code == 405


def test_a_client_that_goes_away_frees_what_it_held(server: Running) -> None:
    """In a stream and while a whole answer is waited for: the fixture finds no request and no block left."""
    body = {"prompt": "a", "max_tokens": 19_000, "temperature": 0}
    with patient.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert server.served.num_unfinished == 1
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.3)
    deadline = time.monotonic() + 30
    while server.served.num_unfinished and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.served.num_unfinished == 0


def test_more_than_is_taken_comes_back_later(server: Running) -> None:
    server.served.max_unfinished = 1
    try:
        for fields in ({"prompt": ["a", "b"]}, {"prompt": "a", "n": 2, "temperature": 1}):
            answer = patient.post(f"{server.url}/v1/completions", json={**fields, "max_tokens": 1})
            assert answer.status_code == 429 and answer.headers["retry-after"]
            assert answer.json()["error"]["type"] == "rate_limit_error"
    finally:
        server.served.max_unfinished = 64


def test_metrics_under_vllms_names(client: Any, server: Running) -> None:
    parser = pytest.importorskip("prometheus_client.parser")

    def read() -> dict[str, float]:
        families = parser.text_string_to_metric_families(patient.get(f"{server.url}/metrics").text)
        return {s.name: s.value for family in families for s in family.samples if "le" not in s.labels}

    before = read()
    client.completions.create(model="tiny", prompt="abc", max_tokens=5)
    list(client.completions.create(model="tiny", prompt="abcdef", max_tokens=6, stream=True))
    after = read()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["vllm:generation_tokens_total"] == 11 and grown["vllm:prompt_tokens_total"] == 4 + 7
    assert grown["vllm:e2e_request_latency_seconds_count"] == grown["vllm:request_params_max_tokens_count"] == 2
    assert grown["vllm:request_generation_tokens_sum"] == 11
    # Of an answer that comes whole nobody sees the first token.
    assert grown["vllm:time_to_first_token_seconds_count"] == grown["vllm:request_decode_time_seconds_count"] == 1
    assert 1 <= grown["vllm:inter_token_latency_seconds_count"] <= 5
    assert grown["vllm:request_queue_time_seconds_count"] == grown["vllm:request_inference_time_seconds_count"] == 2
    assert grown["vllm:request_prefill_time_seconds_count"] == 1
    assert grown["vllm:request_max_num_generation_tokens_sum"] == 11 and after["vllm:cache_config_info"] == 1
    assert after["vllm:num_requests_running"] == 0 and after["vllm:kv_cache_usage_perc"] == 0


def test_the_key_is_asked_for(tmp_path: Any) -> None:
    running = Running(str(save_scripted(tmp_path, "ab", ends=True)), api_key="secret", engine_process=True)
    try:
        assert patient.get(f"{running.url}/health").status_code == 200
        assert patient.get(f"{running.url}/v1/models").json()["error"]["code"] == "invalid_api_key"
        assert patient.get(f"{running.url}/v1/models", headers={"authorization": "Bearer secre"}).status_code == 401
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="secret")
        assert client.completions.create(model="tiny", prompt="x", temperature=0).choices[0].text == "ab"
    finally:
        running.close()


def test_an_engine_that_was_killed_is_told_from_a_busy_one(tmp_path: Any) -> None:
    """What ran ends with an error, /health says so, and a new engine takes its place."""
    folder = save_scripted(tmp_path, "abcdefgh", ends=False)
    edit_json(folder / "config.json", max_position_embeddings=20_000)
    running = Running(str(folder), engine_process=True, max_model_len=20_000, num_gpu_blocks_override=1300)
    try:
        body = {"prompt": "a", "max_tokens": 19_000, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert patient.get(f"{running.url}/health").status_code == 200
            (child,) = running.engine.llm._engine._children.members
            child.process.kill()
            *_, last = (line for line in lines if line)
            assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error", "and no [DONE] behind it"
        patient.wait_until(lambda: running.served.is_restarting)
        assert patient.get(f"{running.url}/health").status_code == 503
        refused = patient.post(f"{running.url}/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503 and refused.headers["retry-after"]
        running.may_restart.set()
        patient.wait_until(lambda: patient.get(f"{running.url}/health").status_code == 200)
        answer = patient.post(f"{running.url}/v1/completions", json={"prompt": "a", "temperature": 0, "max_tokens": 3})
        assert answer.json()["choices"][0]["text"] == "bcd"
        running.may_restart.clear()
        (child,) = running.served.engine.llm._engine._children.members
        child.process.kill()  # while nobody asks anything of it
        patient.wait_until(lambda: patient.get(f"{running.url}/health").status_code == 503)
    finally:
        running.close()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages"])
def test_a_fault_inside_is_no_mistake_of_the_client(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    """Whole it is a 500; in a stream that has begun, the last event."""

    def fail_later(*arguments: Any) -> Any:
        if fail_later.is_due:
            raise TypeError("one and one are three")
        fail_later.is_due = True
        return make_output(*arguments)

    make_output = server.engine.llm._make_output
    monkeypatch.setattr(server.engine.llm, "_make_output", fail_later)
    body = {"prompt": "abc"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "abc"}]}
    for fail_later.is_due, options in ((True, {}), (True, {"stream": True}), (False, {"stream": True})):
        answer = httpx.post(f"{server.url}{path}", json={**body, "max_tokens": 50, **options}, timeout=60)
        assert answer.status_code == (500 if fail_later.is_due and "data:" not in answer.text else 200)
        error = json.loads(answer.text.rpartition("data: ")[2])
        assert error["error"]["message"] == "TypeError: one and one are three"
        assert error["error"]["type"] == ("api_error" if path == "/v1/messages" else "server_error")
        assert answer.headers["x-request-id"] in [record.getMessage() for record in caplog.records]
