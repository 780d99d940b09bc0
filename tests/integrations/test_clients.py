"""Clients in the versions that their users have, against `nanovllm serve` with the demo model: each gets what the
engine says when it is asked directly.

    bash scripts/test_integrations.sh       installs them into an environment of their own
"""

import asyncio
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.model_files.demo_model import ensure_demo_model
from tests.tiny_models import save_scripted

pytestmark = [pytest.mark.integrations, pytest.mark.demo_model]
ROOT = Path(__file__).parents[2]
OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_model_len": 2048, "kv_cache_memory_bytes": 400_000_000
}  # fmt: skip
QUESTION = "Name a colour."
HI: list[Any] = [{"role": "user", "content": QUESTION}]
COLOUR = {
    "type": "object", "properties": {"name": {"type": "string"}, "is_warm": {"type": "boolean"}},
    "required": ["name", "is_warm"], "additionalProperties": False,
}  # fmt: skip
# The demo model was made without tools, and its own template knows none. With this one it is told of them.
TEMPLATE = ROOT / "examples/tools.jinja"


@contextmanager
def serving(model: str, *options: str) -> Iterator[str]:
    """Where `nanovllm serve` listens."""
    command = [sys.executable, "-m", "nanovllm.cli.main", "serve", model, "--port", "0", "--log-level", "warning"]
    small = ["--device", "cpu", "--dtype", "float32", "--kv-cache-memory-bytes", str(OPTIONS["kv_cache_memory_bytes"])]
    process = subprocess.Popen([*command, *small, *options], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stderr is not None
        ready = next((line for line in process.stderr if line.startswith("ready")), "it ended")
        found = re.search(r"http://127\.0\.0\.1:\d+", ready)
        assert found is not None, ready
        yield found[0]
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving("demo", "--max-model-len", "2048", "--chat-template", str(TEMPLATE)) as url:
        yield url


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def answer(llm: LLM) -> str:
    """To QUESTION, greedily, in at most 12 tokens."""
    params = SamplingParams(temperature=0, max_tokens=12)
    (output,) = llm.chat(HI, params, chat_template=TEMPLATE.read_text(), use_tqdm=False)
    assert len(output.outputs[0].text) > 10
    return output.outputs[0].text


ASKED: dict[str, Any] = {"model": "demo", "messages": HI, "max_tokens": 12, "temperature": 0}


def model_of_colours() -> Any:
    from pydantic import BaseModel

    class Colour(BaseModel):
        """A colour and what it is like."""

        name: str
        is_warm: bool

    return Colour


def test_openai(url: str, answer: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert client.chat.completions.create(**ASKED).choices[0].message.content == answer
    chunks = list(client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == answer
    assert chunks[-1].usage.completion_tokens == 12
    given = {**ASKED, "max_tokens": 200, "response_format": model_of_colours()}
    assert client.chat.completions.parse(**given).choices[0].message.parsed.name
    raw = client.chat.completions.with_raw_response.create(**ASKED, extra_headers={"x-request-id": "my-own"})
    assert raw.headers["x-request-id"] == "my-own" and raw.parse().choices[0].message.content == answer
    with client.chat.completions.with_streaming_response.create(**ASKED) as streaming:
        assert json.loads(streaming.read())["choices"][0]["message"]["content"] == answer


def test_openai_asynchronously(url: str, answer: str) -> None:
    openai = pytest.importorskip("openai")

    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(*(client.chat.completions.create(**ASKED) for _ in range(6)))
            assert {one.choices[0].message.content for one in answers} == {answer}
            stream = await client.chat.completions.create(**ASKED, stream=True)
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == answer
            given = {**ASKED, "max_tokens": 200, "response_format": model_of_colours()}
            async with client.chat.completions.stream(**given) as events:
                kinds = {event.type async for event in events}
                final = await events.get_final_completion()
            assert "content.delta" in kinds and final.choices[0].message.parsed.name

    asyncio.run(ask())


def test_openai_responses(url: str, answer: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asked: dict[str, Any] = {"model": "demo", "input": QUESTION, "temperature": 0}
    assert client.responses.create(**asked, max_output_tokens=12).output_text == answer
    with client.responses.stream(**asked, max_output_tokens=12) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text == answer
    parsed = client.responses.parse(**asked, text_format=model_of_colours(), max_output_tokens=200).output_parsed
    assert parsed is not None and parsed.name
    tool = {"type": "function", "name": "paint", "parameters": COLOUR}
    called = client.responses.create(**asked, tools=[tool], tool_choice="required", max_output_tokens=200).output[0]
    assert called.type == "function_call" and set(json.loads(called.arguments)) == {"name", "is_warm"}


def test_anthropic(url: str, answer: str) -> None:
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    asked: dict[str, Any] = {"model": "demo", "messages": HI, "extra_body": {"temperature": 0}}
    message = client.messages.create(**asked, max_tokens=12)
    assert message.content[0].text == answer and message.stop_reason == "max_tokens"
    with client.messages.stream(**asked, max_tokens=12) as stream:
        assert "".join(stream.text_stream) == answer
        assert stream.get_final_message().usage.output_tokens == 12
    count = client.messages.count_tokens(model="demo", messages=HI).input_tokens
    usage = message.usage
    assert count == usage.input_tokens + usage.cache_read_input_tokens
    tool = {"name": "paint", "description": "Paint.", "input_schema": COLOUR}
    with client.messages.stream(**asked, max_tokens=200, tools=[tool], tool_choice={"type": "any"}) as stream:
        called = stream.get_final_message()
    assert called.stop_reason == "tool_use" and set(called.content[0].input) == {"name", "is_warm"}


def test_litellm(url: str, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's server, as OpenAI's and as Anthropic's."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks for prices on the network
    litellm = pytest.importorskip("litellm")
    asked = {**ASKED, "api_key": "none"}
    for name, base in (("hosted_vllm/demo", f"{url}/v1"), ("openai/demo", f"{url}/v1"), ("anthropic/demo", url)):
        given = {**asked, "model": name, "api_base": base}
        assert litellm.completion(**given).choices[0].message.content == answer, name
        chunks = litellm.completion(**given, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer, name
    where = {"api_base": f"{url}/v1", "api_key": "none"}
    vectors = litellm.embedding(model="hosted_vllm/demo", input=["a", "b"], **where).data
    assert len(vectors) == 2 and sum(x * x for x in vectors[0]["embedding"]) == pytest.approx(1, abs=1e-4)


def test_langchain(url: str, answer: str) -> None:
    """Chat, stream, a structured answer in its three ways, and a tool that is called and answered."""
    langchain = pytest.importorskip("langchain_openai")
    where: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "model": "demo", "temperature": 0}
    model = langchain.ChatOpenAI(**where, max_tokens=12, max_retries=0)
    assert model.invoke(QUESTION).content == answer
    assert "".join(chunk.content for chunk in model.stream(QUESTION)) == answer
    longer = langchain.ChatOpenAI(**where, max_tokens=300, max_retries=0)
    colours = model_of_colours()
    for method in ("json_schema", "function_calling"):
        assert longer.with_structured_output(colours, method=method).invoke(QUESTION).name, method
    paint = {"type": "function", "function": {"name": "paint", "description": "Paint.", "parameters": COLOUR}}
    painter = longer.bind_tools([paint], tool_choice="required")
    called = painter.invoke(QUESTION)
    (call,) = called.tool_calls[:1]
    assert call["name"] == "paint" and set(call["args"]) == {"name", "is_warm"}
    results = [{"role": "tool", "tool_call_id": one["id"], "content": "done"} for one in called.tool_calls]
    assert model.bind_tools([paint]).invoke([*HI, called, *results]).response_metadata["finish_reason"]


BLOCKS = re.findall(r"```python\n(.*?base_url=.*?)```", (ROOT / "docs/serving.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[re.findall(r"from (\w+)", block)[0] for block in BLOCKS])
def test_what_the_page_says_can_be_typed(url: str, block: str, capsys: pytest.CaptureFixture[str]) -> None:
    package = re.findall(r"from (\w+)", block)[0]
    pytest.importorskip(package)
    exec(block.replace("http://127.0.0.1:8000", url), {})
    assert capsys.readouterr().out.strip()


def test_the_example_with_langchain(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("langchain_openai")
    monkeypatch.setenv("NANOVLLM_URL", url)
    runpy.run_path(str(ROOT / "examples/serve_langchain.py"))
    assert "City(name=" in capsys.readouterr().out


SCORED = [
    ("The capital of France is", " Paris"), ("The capital of France is", " London"), ("The sky is", " green and"),
    ("Water boils at", " 100 degrees"), ("Q: What is 2 + 2?\nA:", " four"), ("Q: What is 2 + 2?\nA:", " 4"),
]  # fmt: skip


def test_lm_eval_scores_as_the_engine_and_as_its_own_backend_do(url: str, llm: LLM, tmp_path: Path) -> None:
    """By the route that scores token ids, and with Hugging Face's model of the same file."""
    lm_eval = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    model = ensure_demo_model(progress=False)
    AutoTokenizer.from_pretrained(str(model.parent), gguf_file=model.name).save_pretrained(tmp_path)
    served = lm_eval.LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model="demo", tokenizer=str(tmp_path), tokenizer_backend="huggingface",
        num_concurrent=2, max_length=2048,
    )  # fmt: skip
    asked = [Instance("loglikelihood", {}, item, i) for i, item in enumerate(SCORED)]
    scores = served.loglikelihood(asked)
    engine = [llm.score(context, [option])[0] for context, option in SCORED]
    assert [score for score, _ in scores] == pytest.approx(engine, abs=1e-3)
    ours = HFLM(
        pretrained=str(model.parent), gguf_file=model.name, dtype="float32", device="cpu", batch_size=1,
        tokenizer=str(tmp_path),
    )  # fmt: skip
    theirs = ours.loglikelihood(asked)
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in theirs], abs=1e-3)
    assert [is_greedy for _, is_greedy in scores] == [is_greedy for _, is_greedy in theirs]
    assert {is_greedy for _, is_greedy in theirs} == {True, False}
    until = Instance("generate_until", {}, ("The sky is", {"until": ["."], "max_gen_toks": 8, "temperature": 0}), 0)
    (output,) = llm.generate("The sky is", SamplingParams(temperature=0, max_tokens=8, stop="."), use_tqdm=False)
    assert served.generate_until([until]) == [output.outputs[0].text]


def test_guidellm(url: str, tmp_path: Path) -> None:
    """It finds the model, and every request is answered."""
    pytest.importorskip("guidellm")
    from transformers import AutoTokenizer

    model, report = ensure_demo_model(progress=False), tmp_path / "report.json"
    AutoTokenizer.from_pretrained(str(model.parent), gguf_file=model.name).save_pretrained(tmp_path / "tokenizer")
    command = [
        str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console",
        "--backend", f"kind=openai_http,target={url},model=demo",
        "--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6",
        "--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8",
        "--tokenizer", f"kind=hf_auto,model={tmp_path / 'tokenizer'}", "--output", f"kind=json,path={report}",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] == 6 and totals["errored"] == 0


def test_prometheus_reads_every_line(url: str) -> None:
    """By its own parser; no series is there twice."""
    parser = pytest.importorskip("prometheus_client.parser")
    httpx = pytest.importorskip("httpx")
    text = httpx.get(f"{url}/metrics").text
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    assert families["vllm:generation_tokens"].type == "counter"
    series = [(sample.name, *sorted(sample.labels.items())) for f in families.values() for sample in f.samples]
    assert len(series) == len(set(series))
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert [sample.value for sample in families[name].samples] == [0]


def test_schemathesis_finds_nothing_that_the_description_denies(tmp_path: Path) -> None:
    """Bodies of every kind: no status of 500, no answer of another form, nothing taken that is described as wrong.

    What is described as right may be refused all the same: objects inside are not described.
    """
    pytest.importorskip("schemathesis")
    folder = save_scripted(tmp_path, "abcdefgh", ends=False)
    with serving(str(folder), "--served-model-name", "tiny", "--max-model-len", "64") as url:
        command = [
            str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--max-examples", "20",
            "--seed", "1", "--no-color", "--exclude-checks", "positive_data_acceptance",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-5000:]
