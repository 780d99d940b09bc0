"""A server on a port of this machine, with a tiny model whose tokenizer has a chat template."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from nanovllm.async_llm import AsyncLLM
from nanovllm.server.app import make_app
from nanovllm.server.http import BoundedHttp
from nanovllm.server.served import Served
from tests.server import patient
from tests.tiny_models import edit_json, save_scripted


class Running:
    """A served model, and where it listens."""

    def __init__(self, folder: str, api_key: str | None = None, max_unfinished: int = 64, **options: Any) -> None:
        """`may_restart` holds a restart up until it is set."""
        self.may_restart, self._is_closing = threading.Event(), False

        def make_engine() -> AsyncLLM:
            self.may_restart.wait()
            assert not self._is_closing
            return AsyncLLM(folder, device="cpu", dtype="float32", **options)

        self.engine = AsyncLLM(folder, device="cpu", dtype="float32", **options)
        self.served = Served(self.engine, ["tiny", "alias"], max_unfinished)
        app = make_app(self.served, api_key, make_engine=make_engine)
        config = uvicorn.Config(app, http=BoundedHttp, ws="none", host="127.0.0.1", port=0, log_config=None)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 60
        while not self._server.started:
            assert self._thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def settle(self) -> None:
        """Wait until all that clients have sent, also those that have left, is done with and nothing is held."""

        def is_settled() -> bool:
            patient.get(f"{self.url}/health")  # whose connection is taken behind theirs
            metrics = self.engine.llm.get_metrics()
            is_free = metrics["num_free_blocks"] == metrics["num_blocks"]
            return is_free and not (self._server.server_state.tasks or self.served.num_unfinished)

        patient.wait_until(is_settled)

    def close(self) -> None:
        self._is_closing = True
        self.may_restart.set()
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture(scope="session")
def looping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Says "abcdefgh" over and over."""
    folder = save_scripted(tmp_path_factory.mktemp("looping"), "abcdefgh", ends=False)
    edit_json(folder / "config.json", max_position_embeddings=20_000)
    running = Running(str(folder), max_model_len=20_000, num_gpu_blocks_override=1300, max_num_seqs=8)
    yield running
    running.close()


HERMES = (
    "{{ bos_token }}{% if tools %}<|im_start|>system\nAnswer with <tool_call>. {{ tools | tojson }}"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{# it may write <think> first #}"
)


@pytest.fixture(scope="session")
def tooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Its chat template knows tools and reasoning. What it says is up to a form of the request: `says`."""
    folder = save_scripted(tmp_path_factory.mktemp("tooled"), "abcdefgh", ends=False)
    edit_json(folder / "config.json", max_position_embeddings=4000)
    (folder / "chat_template.jinja").write_text(HERMES)
    running = Running(str(folder), max_model_len=4000, num_gpu_blocks_override=600, max_num_seqs=8)
    yield running
    running.close()


def says(text: str) -> dict[str, Any]:
    """Fields of a body that make a model write this."""
    return {"structured_outputs": {"choice": [text]}}


@pytest.fixture
def server(looping: Running) -> Iterator[Running]:
    """With nothing left over by a test."""
    yield looping
    looping.settle()
    looping.engine.llm.reset_prefix_cache()
