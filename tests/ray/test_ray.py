"""Ray Data and Ray Serve for real: a local cluster of two nodes, an actor that is killed, a job that goes on.

Skipped where Ray is not installed.
"""

import asyncio
import json
import os
import signal
import socket
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.ray import NanoBatch, build_openai_app
from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, save_random, save_tokenizer

pytestmark = pytest.mark.integrations
ENGINE = {"device": "cpu", "dtype": "float32", "num_gpu_blocks_override": 128, "max_num_seqs": 8}
NUM_ROWS, PARAMS = 48, {"temperature": 0.8, "seed": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = save_random(tmp_path_factory.mktemp("model"), vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    from ray.cluster_utils import Cluster

    sizes = {"num_cpus": 2, "object_store_memory": 200 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**sizes, "include_dashboard": False})
    cluster.add_node(**sizes)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()
    cluster.shutdown()


def make_rows() -> list[dict[str, Any]]:
    return [
        {"id": f"r{i}", "prompt": f"question {i}", "sampling_params": {"max_tokens": 3 + i % 5}}
        for i in range(NUM_ROWS)
    ]


def expected(model: str) -> dict[str, list[int]]:
    rows = make_rows()
    with LLM(model, **ENGINE) as llm:
        params = [SamplingParams(**PARAMS, **row["sampling_params"]) for row in rows]
        outputs = llm.generate([row["prompt"] for row in rows], params, use_tqdm=False)
    return {row["id"]: output.outputs[0].token_ids for row, output in zip(rows, outputs, strict=True)}


def start(ray: Any, model: str, rows: list[dict[str, Any]], kind: type, **more: Any) -> Any:
    dataset = ray.data.from_items(rows, override_num_blocks=12)
    given = {"model": model, "sampling_params": PARAMS, "engine_kwargs": ENGINE, **more}
    compute = ray.data.ActorPoolStrategy(size=2)
    return dataset.map_batches(kind, compute=compute, num_cpus=1, batch_size=4, fn_constructor_kwargs=given)


def watched(folder: Path, harm: Callable[[], Awaitable[None]]) -> type:
    """A NanoBatch that notes what it computes, and comes to harm once, half-way."""

    class Watched(NanoBatch):
        async def _answer(self, row: Any) -> Any:
            (folder / f"{row['id']}.{os.getpid()}").touch()
            if len(list(folder.glob("r*"))) >= NUM_ROWS // 2 and not (folder / "harmed").exists():
                await harm()
            return await super()._answer(row)

    return Watched


def test_two_nodes_and_an_actor_that_is_killed_in_mid_job(ray: Any, model: str, tmp_path: Path) -> None:
    async def kill() -> None:
        (tmp_path / "harmed").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    rows = start(ray, model, make_rows(), watched(tmp_path, kill)).take_all()
    assert (tmp_path / "harmed").exists()
    assert len(rows) == NUM_ROWS and {row["id"]: row["generated_tokens"] for row in rows} == expected(model)
    assert len({path.suffix for path in tmp_path.glob("r*")}) == 3, "two actors, and the one that came for the dead one"
    assert all(row["__inference_error__"] == "" and row["prompt"].startswith("question") for row in rows)
    assert all(row["num_generated_tokens"] == 3 + int(row["id"][1:]) % 5 for row in rows)


def test_a_job_that_failed_goes_on_from_rays_checkpoint(ray: Any, model: str, tmp_path: Path) -> None:
    from ray.data.checkpoint import CheckpointConfig

    context = ray.data.DataContext.get_current()
    seen, out = tmp_path / "seen", tmp_path / "out"
    seen.mkdir()

    async def fail_once_something_is_written() -> None:
        while not list(out.glob("*.parquet")):
            await asyncio.sleep(0.05)
        (seen / "harmed").touch()
        raise KeyError("a mistake of ours")

    source = tmp_path / "in.parquet"
    ray.data.from_items(make_rows(), override_num_blocks=12).write_parquet(str(source))
    context.checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=str(tmp_path / "checkpoint"), delete_checkpoint_on_success=False
    )
    size, context.target_max_block_size = context.target_max_block_size, 300  # else rows as few are one block
    try:
        given = {"model": model, "sampling_params": PARAMS, "engine_kwargs": ENGINE}

        def run() -> None:
            dataset = ray.data.read_parquet(str(source), override_num_blocks=12).map_batches(
                watched(seen, fail_once_something_is_written),
                compute=ray.data.ActorPoolStrategy(size=1),
                num_cpus=1,
                batch_size=4,
                fn_constructor_kwargs=given,
            )
            dataset.write_parquet(str(out))

        with pytest.raises(ray.exceptions.RayTaskError):
            run()
        done = {row["id"] for row in read_rows(out)}
        assert 0 < len(done) < NUM_ROWS
        for path in seen.glob("r*"):
            path.unlink()
        run()
        again = {path.stem for path in seen.glob("r*")}
        assert not again & done, "no row that was written is computed twice"
    finally:
        context.checkpoint_config, context.target_max_block_size = None, size
    rows = read_rows(out)
    assert len(rows) == NUM_ROWS and {row["id"]: row["generated_tokens"] for row in rows} == expected(model)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    parquet = pytest.importorskip("pyarrow.parquet")
    return [row for path in sorted(folder.glob("*.parquet")) for row in parquet.read_table(path).to_pylist()]


def test_rows_that_cannot_be_computed_say_why(ray: Any, model: str) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "good", "sampling_params": {"max_tokens": 2}},
        {"prompt": "good", "sampling_params": {"max_tokens": 0}},
        {"prompt": "x" * 5000, "sampling_params": {"max_tokens": 2}},
        {"prompt": "good", "sampling_params": {"max_tokens": 2, "logit_bias": {"97": 100}, "temperature": 0.0}},
        {"prompt": "good", "sampling_params": {"max_tokens": 9, "structured_outputs": {"choice": ["bb"]}}},
    ]
    rows = [{"id": number, **row} for number, row in enumerate(rows)]
    answers = start(ray, model, rows, NanoBatch, should_continue_on_error=True).take_all()
    good, bad, long, biased, chosen = sorted(answers, key=lambda row: row["id"])
    assert good["__inference_error__"] == "" and good["num_generated_tokens"] == 2
    assert "max_tokens" in bad["__inference_error__"] and bad["generated_tokens"] == []
    assert "max_model_len" in long["__inference_error__"]
    assert (biased["generated_text"], chosen["generated_text"]) == ("aa", "bb")


def test_the_servers_app_as_a_deployment(ray: Any, model: str) -> None:
    serve = pytest.importorskip("ray.serve")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        app = build_openai_app(
            model, served_model_name="tiny", engine_kwargs=ENGINE, num_replicas=1, ray_actor_options={"num_cpus": 1}
        )
        serve.run(app, name="llm", route_prefix="/")
        url = f"http://127.0.0.1:{port}"
        body = {"model": "tiny", "prompt": "once", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
        answer = json.loads(post(f"{url}/v1/completions", body))
        assert answer["usage"]["completion_tokens"] == 5
        events = post(f"{url}/v1/completions", {**body, "stream": True}).decode()
        streamed = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
        assert "".join(event["choices"][0]["text"] for event in streamed) == answer["choices"][0]["text"]
        assert events.rstrip().endswith("data: [DONE]")
    finally:
        serve.shutdown()


def test_the_ranks_of_one_model_in_actors_of_two_nodes(ray: Any, model: str) -> None:
    @ray.remote(num_cpus=2)  # a node has no room for another
    class Rank:
        def generate(self, rank: int, port: int) -> list[list[int]]:
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
            place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            os.environ.update({**meeting, **place})
            options = {**ENGINE, "tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"}
            with LLM(model, **options) as llm:
                outputs = llm.generate(["one", "two"], SamplingParams(max_tokens=6, **PARAMS), use_tqdm=False)
            return [output.outputs[0].token_ids for output in outputs]

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = [Rank.remote() for _ in range(2)]
    first, second = ray.get([one.generate.remote(rank, port) for rank, one in enumerate(ranks)], timeout=240)
    for one in ranks:
        ray.kill(one)
    with LLM(model, **ENGINE) as llm:
        outputs = llm.generate(["one", "two"], SamplingParams(max_tokens=6, **PARAMS), use_tqdm=False)
    assert first == second == [output.outputs[0].token_ids for output in outputs]


def post(url: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())
