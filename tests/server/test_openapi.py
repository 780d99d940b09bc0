"""The description says what the routes do: it is compared with what they take of a body."""

from typing import Any

import pytest

from nanovllm.server.app import make_app
from nanovllm.server.body import Body
from nanovllm.server.openapi import GETS, OPERATIONS, describe
from tests.server import patient
from tests.server.conftest import Running

HI = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HI, "max_tokens": 1},
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 1, "stream": True, "stream_options": {}},
    "/v1/messages": {"messages": HI, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": HI},
    "/v1/embeddings": {"input": "a"},
    "/score": {"text_1": "a", "text_2": "b"},
    "/v1/score": {"text_1": "a", "text_2": ["b"]},
    "/inference/v1/generate": {"token_ids": [97], "sampling_params": {"max_tokens": 1}},
    "/tokenize": {"messages": HI},
    "/detokenize": {"tokens": [97]},
}


@pytest.mark.parametrize("path", OPERATIONS)
def test_a_route_takes_the_fields_that_are_described(
    server: Running, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, of these kinds, and an answer has what is said of it."""
    taken: dict[str, Any] = {}
    take, refuse = Body.take, Body.refuse
    refused = set()

    def note_kind(self: Body, name: str, kind: Any, default: Any = None) -> Any:
        if self._path == "":
            taken[name] = kind
        return take(self, name, kind, default)

    def note_refusal(self: Body, name: str, *more: Any) -> None:
        if self._path == "":
            refused.add(name)
        refuse(self, name, *more)

    monkeypatch.setattr(Body, "take", note_kind)
    monkeypatch.setattr(Body, "refuse", note_refusal)
    answer = patient.post(server.url + path, json=BODIES[path])
    assert answer.status_code == 200, answer.text
    operation = OPERATIONS[path]
    described = {**operation.required, **operation.optional}
    assert described == {name: kind for name, kind in taken.items() if name not in refused}
    if not BODIES[path].get("stream"):
        assert set(operation.answer) <= answer.json().keys()
    for name in operation.required:
        left = {other: value for other, value in BODIES[path].items() if other != name}
        assert patient.post(server.url + path, json=left).status_code == 400


def test_every_route_is_described(server: Running) -> None:
    document = patient.get(f"{server.url}/openapi.json").json()
    assert document == describe(["tiny", "alias"])
    for path in (*OPERATIONS, *GETS):
        answer = patient.get(server.url + path.replace("{name}", "alias"))
        assert answer.status_code == (405 if path in OPERATIONS else 200)
        assert path in GETS or answer.headers["allow"] == "POST"
    routes = make_app(server.served)._app.routes  # type: ignore[attr-defined]
    assert {route.path.replace(":path", "") for route in routes} == {*OPERATIONS, *GETS, "/openapi.json", "/"}
