"""Weights, pause and sleep over HTTP, where that is allowed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from nanovllm.async_llm import AsyncLLM
from nanovllm.server.app import make_app
from nanovllm.server.live import ROUTES
from nanovllm.server.served import Served
from tests.live.new_weights import save_two
from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, save_tokenizer

ASK = {"prompt": "once upon a time", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = save_two(tmp_path_factory.mktemp("two"), vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS)
    save_tokenizer(folders[0])
    return folders


@pytest.fixture(scope="module")
def served(folders: list[Path]) -> Served:
    return Served(AsyncLLM(str(folders[0]), device="cpu", dtype="float32", max_model_len=64), ["tiny"], 16)


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[TestClient]:
    with TestClient(make_app(served, dev_mode=True)) as client:
        yield client


def text(client: TestClient) -> str:
    answer = client.post("/v1/completions", json=ASK)
    assert answer.status_code == 200, answer.text
    result: str = answer.json()["choices"][0]["text"]
    return result


def post(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body) if body else client.post(path)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json() if answer.content else {}
    return result


def test_nobody_finds_the_routes_unless_they_are_asked_for(served: Served) -> None:
    client = TestClient(make_app(served))  # without its life span, which would end the engine
    for path, (_, method) in ROUTES.items():
        assert client.request(method, path).status_code == 404


def test_new_weights_at_once_and_in_parts(client: TestClient, folders: list[Path]) -> None:
    old = text(client)
    version = client.get("/get_weight_version").json()["weight_version"]
    assert post(client, "/update_weights", update_info={"path": str(folders[1])}) == {
        "status": "updated",
        "weight_version": version + 1,
    }
    new = text(client)
    assert new != old
    post(client, "/start_weight_update")
    post(client, "/update_weights", update_info={"path": str(folders[0])})
    assert text(client) == new
    assert post(client, "/finish_weight_update?mode=recompute")["weight_version"] == version + 2
    assert text(client) == old
    assert client.get("/get_world_size").json() == {"world_size": 1}
    post(client, "/reset_prefix_cache")


def test_sleep_and_pause(client: TestClient, folders: list[Path]) -> None:
    before = text(client)
    post(client, "/sleep?level=2")
    assert client.get("/is_sleeping").json() == {"is_sleeping": True}
    answer = client.post("/v1/completions", json=ASK)
    assert answer.status_code == 503 and "sleeps" in answer.text and answer.headers["retry-after"]
    assert client.post("/update_weights", json={"update_info": {"path": str(folders[0])}}).status_code == 409
    post(client, "/wake_up?tags=weights")
    if client.get("/get_weight_version").json()["weight_version"]:
        assert client.post("/v1/completions", json=ASK).status_code == 503
    post(client, "/update_weights", update_info={"path": str(folders[0])})
    post(client, "/wake_up?tags=kv_cache")
    assert text(client) == before
    post(client, "/pause?mode=keep")
    assert client.get("/is_paused").json() == {"is_paused": True}
    post(client, "/resume")
    assert text(client) == before


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/sleep?level=3", None, 400, "level must be 1 or 2"),
        ("/wake_up?tags=all", None, 400, "tags must be"),
        ("/pause?mode=hard", None, 400, "mode must be"),
        ("/finish_weight_update", None, 409, "no update is open"),
        ("/init_weight_transfer_engine", {"init_info": {}}, 501, "NCCL between processes is not supported"),
        ("/update_weights", {"update_info": {"names": ["a"], "packed": True}}, 400, "packed is not supported"),
        ("/update_weights", {"update_info": {"names": ["a"]}}, 400, "needs names and handles, or path"),
        ("/update_weights", {"update_info": {"names": ["a"], "handles": [{}]}}, 400, "the handle of 'a' is none"),
        ("/update_weights", {"update_info": {"path": "/nowhere"}}, 400, r"holds no *.safetensors"),
    ],
)
def test_what_is_wrong_is_said(client: TestClient, path: str, body: Any, status: int, message: str) -> None:
    answer = client.post(path, json=body) if body else client.post(path)
    assert answer.status_code == status and message in answer.json()["error"]["message"]
    assert text(client)
