"""/score gives what `LLM.score` gives; `nanovllm top` shows what /metrics says."""

from typing import Any

import pytest

from nanovllm.cli.main import main
from tests.server import patient
from tests.server.conftest import Running


def test_scores_are_those_of_llm_score(server: Running) -> None:
    llm = server.engine.llm
    answer = patient.post(f"{server.url}/score", json={"text_1": "abc", "text_2": ["de", "xyz"]}).json()
    assert [one["score"] for one in answer["data"]] == pytest.approx(llm.score("abc", ["de", "xyz"]))
    assert answer["usage"]["prompt_tokens"] == 4 + 2 + 4 + 3 and answer["model"] == "tiny"
    pairs = patient.post(f"{server.url}/v1/score", json={"text_1": ["a", "b"], "text_2": ["b", "a"]}).json()["data"]
    assert [one["score"] for one in pairs] == pytest.approx([*llm.score("a", ["b"]), *llm.score("b", ["a"])])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text_1": "a"}, "text_2"),
        ({"text_1": "a", "text_2": ""}, "text_2"),
        ({"text_1": "a", "text_2": [1]}, "text_2"),
        ({"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ({"text_1": "a", "text_2": "b" * 30_000}, None),
    ],
)
def test_what_is_wrong_is_named(server: Running, body: dict[str, Any], param: str | None) -> None:
    answer = patient.post(f"{server.url}/score", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_top(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", f"{server.url}/v1", "--interval", "0.01", "--count", "2"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["running", "waiting"] and len(lines) == 2
    assert all(line.split()[:2] == ["0", "0"] and len(line) == len(head) for line in lines)
    assert main(["top", "127.0.0.1:1", "--count", "1"]) == 2
    assert "no metrics from http://127.0.0.1:1/metrics" in capsys.readouterr().err
