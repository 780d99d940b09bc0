"""Token ids in, token ids out."""

import json
from typing import Any

import httpx
import pytest

from nanovllm import SamplingParams
from tests.server.conftest import Running
from tests.tiny_models import VOCAB_WITH_TOKENIZER

PROMPT = [ord("a"), ord("b")]


def post(server: Running, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/inference/v1/generate", json=body, timeout=60)


def test_ids_and_log_probabilities_are_those_of_the_engine(server: Running) -> None:
    params: dict[str, Any] = {
        "temperature": 0.8,
        "seed": 5,
        "n": 2,
        "max_tokens": 6,
        "logprobs": 1,
        "prompt_logprobs": 0,
    }
    answer = post(server, token_ids=PROMPT, sampling_params=params, request_id="mine").json()
    (output,) = server.engine.llm.generate([PROMPT], SamplingParams(**params), use_tqdm=False)
    assert answer["request_id"] == "mine" and answer["usage"]["completion_tokens"] == 12
    for choice, completion in zip(answer["choices"], output.outputs, strict=True):
        assert choice["token_ids"] == completion.token_ids and choice["finish_reason"] == "length"
        assert completion.logprobs is not None
        for entry, token_id, entries in zip(
            choice["logprobs"]["content"], completion.token_ids, completion.logprobs, strict=True
        ):
            assert entry["token"] == f"token_id:{token_id}" and len(entry["top_logprobs"]) == 1
            assert entry["logprob"] == pytest.approx(entries[token_id].logprob, abs=1e-4)
    first, second = answer["prompt_logprobs"]
    assert first is None and list(second) == [str(PROMPT[1])]


def test_a_stream_adds_up(server: Running) -> None:
    params = {"temperature": 0, "max_tokens": 9, "logprobs": 0, "prompt_logprobs": 0}
    body = {"token_ids": PROMPT, "sampling_params": params, "stream": True, "stream_options": {"include_usage": True}}
    lines = [line for line in post(server, **body).text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    ids = [one for chunk in chunks[:-1] for one in chunk["choices"][0]["token_ids"]]
    assert bytes(ids) == b"cdefghabc" and chunks[-1]["usage"]["completion_tokens"] == 9
    assert len(chunks[0]["prompt_logprobs"]) == 2 and chunks[-2]["choices"][0]["finish_reason"] == "length"


def test_a_string_may_end_it(server: Running) -> None:
    params = {"temperature": 0, "max_tokens": 9, "stop": "ef"}
    (choice,) = post(server, token_ids=PROMPT, sampling_params=params).json()["choices"]
    assert bytes(choice["token_ids"]) == b"cdef" and choice["stop_reason"] == "ef"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "token_ids", "missing"),
        ({"token_ids": [VOCAB_WITH_TOKENIZER]}, None, str(VOCAB_WITH_TOKENIZER)),
        ({"token_ids": ["a"]}, None, "'a'"),
        ({"token_ids": []}, None, "prompt"),
        ({"token_ids": [1], "sampling_params": {"temprature": 1}}, "sampling_params.temprature", "'temperature'"),
        ({"token_ids": [1], "sampling_params": {"n": "x"}}, "sampling_params.n", "an integer"),
        ({"token_ids": [1], "priority": 3}, "priority", "not supported"),
    ],
)
def test_what_is_wrong_is_named(server: Running, body: dict[str, Any], param: str | None, message: str) -> None:
    answer = post(server, **body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param and message in answer.json()["error"]["message"]
