"""What a client may not do: get in without the key, hold what it has no right to, speak in another's name."""

import inspect
import logging
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from nanovllm.chat_template import render_chat
from nanovllm.cli.main import main
from nanovllm.server import http
from nanovllm.server.app import make_app
from tests.server import patient
from tests.server.conftest import Running

HI = [{"role": "user", "content": "Hi"}]


def app_of(running: Running, **options: Any) -> TestClient:
    """Its routes under other rules, without a port."""
    return TestClient(make_app(running.served, **options))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401), ({"authorization": "Bearer "}, 401), ({"authorization": "Bearer secre"}, 401),
        ({"x-api-key": "sécret"}, 401), ({"authorization": "Bearer secret"}, 200), ({"x-api-key": "secret"}, 200),
    ],
)  # fmt: skip
def test_only_the_key_opens(server: Running, headers: dict[str, str], status: int) -> None:
    given = {name: value.encode() for name, value in headers.items()}
    for path in ("/v1/models", "/metrics", "/load"):
        assert app_of(server, api_key="secret").get(path, headers=given).status_code == status
    assert app_of(server, api_key="").get("/v1/models", headers=given).status_code == 401


@pytest.mark.parametrize("arguments", [["--api-key", ""], []])
def test_an_empty_key_is_known_before_the_model_is_loaded(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOVLLM_API_KEY", " ")
    assert main(["serve", "no-such-model", *arguments]) == 2
    assert "is empty" in capsys.readouterr().err


def test_the_log_has_no_key_and_a_line_for_each_request(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is in the path, the query or the id."""
    client = app_of(server, api_key="secret")
    ids = {"good-id_1.2:3": True, "a b": False, "\x9b31m": False, "x" * 101: False}
    with caplog.at_level(logging.DEBUG):
        for given, is_kept in ids.items():
            headers = {"x-request-id": given.encode("latin-1"), "authorization": b"Bearer secret"}
            answer = client.get("/v1/x%0a%1b[2JINFO%20all%20is%20well?api_key=secret", headers=headers)
            assert (answer.headers["x-request-id"] == given) == is_kept
        client.get("/v1/models", headers={"authorization": "Bearer secret-but-wrong"})
    lines = [record.getMessage() for record in caplog.records if record.name == "nanovllm.server"]
    assert len(lines) == len(ids) + 1
    assert all(line.isprintable() and line.isascii() and "secret" not in line for line in lines)


def test_pages_of_other_sites_get_nothing_unless_they_are_allowed(server: Running) -> None:
    origin = {"origin": "https://chat.example"}
    asked = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    closed, opened = app_of(server), app_of(server, api_key="secret", allowed_origins=["https://chat.example"])
    assert "access-control-allow-origin" not in closed.get("/v1/models", headers=origin).headers
    assert closed.options("/v1/completions", headers=asked).status_code == 405
    assert opened.options("/v1/completions", headers=asked).headers["access-control-allow-origin"] == origin["origin"]
    assert opened.options("/v1/completions", headers={**asked, "origin": "https://other.example"}).status_code == 400
    assert opened.get("/v1/models", headers=origin).status_code == 401


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_form_of_any_page_can_send_is_not_read(server: Running, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    answer = patient.post(f"{server.url}/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert answer.status_code == 415 and "application/json" in answer.json()["error"]["message"]


def test_templates_of_requests_are_run_for_those_who_trust_them(server: Running) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for fields in ({"chat_template": template}, {"chat_template_kwargs": {"chat_template": template}}):
        body = {"messages": HI, "max_tokens": 1, **fields}
        answer = patient.post(f"{server.url}/v1/chat/completions", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "chat_template"
        server.served.trust_request_chat_template = True
        try:
            answer = patient.post(f"{server.url}/v1/chat/completions", json=body)
        finally:
            server.served.trust_request_chat_template = False
        assert answer.json()["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_request_does_not_move_the_bounds_of_templates(server: Running, path: str) -> None:
    known = {"hf", "messages", "add_generation_prompt", "continue_final_message", "tools", "chat_template", "variables"}
    ours = inspect.signature(render_chat).parameters.keys() - known
    assert {"max_seconds", "max_bytes"} <= ours
    for name in ours:
        body = {"messages": HI, "input": "Hi", "max_tokens": 1, "chat_template_kwargs": {name: 10**9}}
        del body["input" if "responses" not in path else "messages"]
        answer = patient.post(server.url + path, json=body)
        assert answer.status_code == 400 and name in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///{}"}}]}]},
        {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "file:///{}"}}}},
        {"messages": HI, "structured_outputs": {"json": "{}"}},
        {"messages": HI, "structured_outputs": {"grammar": "%import {} (X)\nstart: X"}},
        {"messages": HI, "model": "{}"},
    ],
)
def test_no_field_is_the_name_of_a_file(server: Running, tmp_path: Path, fields: dict[str, Any]) -> None:
    """The file would give an answer, or its text would be in the error."""
    secret = tmp_path / "secret.json"
    secret.write_text('{"const": "tell nobody"}')
    body = httpx.Request("POST", server.url, json=fields).content.replace(b"{}", str(secret).encode())
    headers = {"content-type": "application/json"}
    answer = patient.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code in (400, 404) and "tell nobody" not in answer.text, answer.text


def test_a_head_without_end_is_ended(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its length, and by its time: both before any key is asked for."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as endless:
        endless.sendall(b"GET /health HTTP/1.1\r\nx-a: ")
        with pytest.raises(OSError):
            for _ in range(10_000):
                endless.sendall(b"a" * 10_000)
                time.sleep(0.001)
    with socket.create_connection(("127.0.0.1", server.port), timeout=600) as kept:
        kept.sendall(b"GET /ping HTTP/1.1\r\nhost: a\r\n\r\n")
        assert b"200 OK" in kept.recv(10_000)
        monkeypatch.setattr(http, "HEAD_SECONDS", 0.1)
        kept.sendall(b"GET /ping HTT")
        assert kept.recv(10_000) == b""
    for beginning in (b"", b"GET /hea"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=600) as slow:
            slow.sendall(beginning)
            assert slow.recv(10_000) == b""


def test_a_body_that_trickles_is_ended(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm.server.body.MAX_SECONDS", 0.1)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as slow:
        slow.sendall(head)
        assert slow.recv(10_000).startswith(b"HTTP/1.1 408")
