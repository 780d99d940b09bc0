"""/v1/embeddings as OpenAI's own client sees it."""

from typing import Any

import pytest

from tests.server import patient
from tests.server.conftest import Running
from tests.tiny_models import save_random, save_tokenizer

openai = pytest.importorskip("openai")
TEXTS = ["a text", "another one, longer"]


def test_vectors_are_the_engines(tmp_path: Any) -> None:
    """Through a process of the engine's own; the client asks for base64 by itself."""
    folder = save_random(tmp_path, vocab_size=272)
    save_tokenizer(folder)
    running = Running(str(folder), engine_process=True)
    try:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        known = [output.outputs.embedding for output in running.engine.llm.embed(TEXTS)]
        answer = client.embeddings.create(model="tiny", input=TEXTS)
        for item, vector in zip(answer.data, known, strict=True):
            assert item.embedding == pytest.approx(vector, abs=1e-5)
        ids = [running.served.tokenizer.encode(text) for text in TEXTS]
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        (item,) = client.embeddings.create(
            model="tiny", input=ids[1], encoding_format="float", extra_body={"pooling": "mean", "normalize": False}
        ).data
        (output,) = running.engine.llm.embed([ids[1]], pooling="mean", normalize=False)
        assert item.embedding == pytest.approx(output.outputs.embedding, abs=1e-5)
        assert len(client.embeddings.create(model="tiny", input="x", dimensions=5).data[0].embedding) == 5
    finally:
        running.close()


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "missing"),
        ({"input": []}, "input", "0 prompts"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'base64'"),
        ({"input": "a", "pooling": "cls"}, "pooling", "'mean'"),
        ({"input": "a", "dimensions": 100_000}, "dimensions", "dimensions is 100000"),
    ],
)
def test_what_is_wrong_is_named(server: Running, body: dict[str, Any], param: str | None, message: str) -> None:
    answer = patient.post(f"{server.url}/v1/embeddings", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param and message in answer.json()["error"]["message"]
