"""Adapters over HTTP: a name for each, listed, asked for, loaded and unloaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from nanovllm import SamplingParams
from nanovllm.async_llm import AsyncLLM
from nanovllm.lora.request import LoRARequest
from nanovllm.server.adapters import read_modules
from nanovllm.server.app import make_app
from nanovllm.server.served import Served
from tests.lora.random_adapters import make_tensors, save
from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, load_hugging_face, save_random, save_tokenizer

TEXT = "once upon a time"
ASK = {"prompt": TEXT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random(tmp_path_factory.mktemp("model"), vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS)
    save_tokenizer(folder)
    hf = load_hugging_face(folder)
    for seed in range(2):
        save(folder / f"adapter{seed}", make_tensors(hf, seed=seed))
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Served:
    engine = AsyncLLM(str(folder), device="cpu", dtype="float32", enable_lora=True, max_loras=2, max_model_len=64)
    return Served(engine, ["tiny"], 16, adapters=read_modules([f"first={folder / 'adapter0'}"]))


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[TestClient]:
    with TestClient(make_app(served, updates_adapters=True)) as client:
        yield client


def text_of(served: Served, adapter: LoRARequest | None) -> str:
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    return served.engine.llm.generate(TEXT, params, use_tqdm=False, lora_request=adapter)[0].outputs[0].text


def models(client: TestClient) -> dict[str, Any]:
    return {card["id"]: card["parent"] for card in client.get("/v1/models").json()["data"]}


def test_a_name_is_an_adapter(client: TestClient, served: Served, folder: Path) -> None:
    assert models(client) == {"tiny": None, "first": "tiny"}
    assert client.get("/v1/models/first").json()["root"] == str(folder / "adapter0")
    base, ours = (client.post("/v1/completions", json={**ASK, "model": name}).json() for name in ("tiny", "first"))
    assert ours["model"] == "first"
    assert [one["choices"][0]["text"] for one in (base, ours)] == [
        text_of(served, None),
        text_of(served, served.adapters["first"]),
    ]
    assert base["choices"] != ours["choices"]
    for path, body in [
        ("/v1/embeddings", {"input": TEXT}),
        ("/v1/score", {"text_1": TEXT, "text_2": [" and"]}),
    ]:
        answers = [client.post(path, json={**body, "model": name}).json()["data"] for name in ("tiny", "first")]
        assert answers[0] != answers[1]
    with client.stream("POST", "/v1/completions", json={**ASK, "model": "first", "stream": True}) as stream:
        assert '"model":"first"' in stream.read().decode().replace(" ", "")


def test_loaded_replaced_and_unloaded(client: TestClient, served: Served, folder: Path) -> None:
    path = folder / "adapter1"
    loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "second", "lora_path": str(path)})
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'second' added successfully.")
    assert models(client) == {"tiny": None, "first": "tiny", "second": "tiny"}

    def ask() -> str:
        return client.post("/v1/completions", json={**ASK, "model": "second"}).json()["choices"][0]["text"]

    assert ask() == text_of(served, LoRARequest("second", str(path))) != text_of(served, None)
    in_place = {"lora_name": "second", "lora_path": str(folder / "adapter0"), "load_inplace": True}
    assert client.post("/v1/load_lora_adapter", json=in_place).status_code == 200
    assert ask() == text_of(served, served.adapters["first"])
    for body, status, words in [
        ({"lora_name": "second", "lora_path": str(path)}, 400, "already"),
        ({"lora_name": "tiny", "lora_path": str(path)}, 400, "already"),
        ({"lora_name": "third", "lora_path": "/nowhere"}, 404, "there is no folder"),
    ]:
        refused = client.post("/v1/load_lora_adapter", json=body)
        assert refused.status_code == status and words in refused.json()["error"]["message"]
    unloaded = client.post("/v1/unload_lora_adapter", json={"lora_name": "second"})
    assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'second' removed successfully.")
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "second"}).status_code == 404
    assert client.post("/v1/completions", json={**ASK, "model": "second"}).status_code == 404
    assert models(client) == {"tiny": None, "first": "tiny"}


def test_clients_change_nothing_unless_they_may(served: Served) -> None:
    client = TestClient(make_app(served))  # without its life span, which would end the engine
    assert client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "y"}).status_code == 404


def test_modules_of_the_command_line() -> None:
    adapters = read_modules(["a=/one", '{"name": "b", "path": "/two", "base_model_name": "m"}'])
    assert {name: adapter.lora_path for name, adapter in adapters.items()} == {"a": "/one", "b": "/two"}
    for given, words in [(["a"], "takes name=path"), (["{a"], "is no JSON"), (["a=1", "a=2"], "names 'a' twice")]:
        with pytest.raises(ValueError, match=words):
            read_modules(given)
