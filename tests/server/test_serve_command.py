"""`nanovllm serve` as a process: ready, answering, and its end."""

import asyncio
import re
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from nanovllm.cli.main import main
from nanovllm.cli.serve import _make_engine
from nanovllm.server.restart import keep_alive
from tests.server import patient
from tests.server.conftest import Running
from tests.tiny_models import edit_json, save_scripted


def test_sigterm_lets_a_stream_end_and_takes_nothing_new(tmp_path: Path) -> None:
    folder = save_scripted(tmp_path, "abcdefgh", ends=False)
    edit_json(folder / "config.json", max_position_embeddings=2000)
    command = [sys.executable, "-m", "nanovllm.cli.main", "serve", str(folder), "--port", "0"]
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    options = ["--device", "cpu", "--dtype", "float32", "--served-model-name", "tiny", "--log-level", "error"]
    options += ["--chat-template", str(tmp_path / "own.jinja")]
    options += ["--drain-seconds", "600"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        ready = next(line for line in process.stderr if line.startswith("ready"))
        found = re.search(r"http://127\.0\.0\.1:\d+", ready)
        assert found is not None, ready
        asked = {"messages": [{"role": "user", "content": "Hi"}]}
        assert httpx.post(f"{found[0]}/tokenize", json=asked, timeout=600).json()["tokens"] == list(b"Hi")
        body = {"model": "tiny", "prompt": "a", "max_tokens": 1500, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{found[0]}/v1/completions", json=body, timeout=600) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]" and '"length"' in events[-2]
        assert process.wait(600) == 0
    finally:
        process.kill()
        process.wait()


def test_each_engine_has_the_template_that_was_given(tmp_path: Path) -> None:
    """Also one in the place of another that died."""
    folder = save_scripted(tmp_path, "ab", ends=True)
    engine = _make_engine(str(folder), {"device": "cpu", "dtype": "float32"}, "{{ messages[0].content }}!")
    try:
        assert engine.llm._known_tokenizer().render_chat([{"role": "user", "content": "Hi"}]) == "Hi!"
    finally:
        engine._close()


def test_the_log_says_that_an_engine_has_died(caplog: pytest.LogCaptureFixture) -> None:
    served: Any = SimpleNamespace(engine=SimpleNamespace(is_alive=False))
    asyncio.run(keep_alive(served, None))
    assert "has died" in caplog.text


def test_a_port_that_is_taken_is_known_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "no-such-model", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err


def test_vllms_path_starts_the_same_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["api_server", "--model", "no-such-model", "--host", "not a host"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("nanovllm.entrypoints.openai.api_server", run_name="__main__")
    assert caught.value.code == 2 and "cannot listen on not a host" in capsys.readouterr().err


@pytest.mark.slow
def test_two_engines_behind_a_port_share_requests_by_their_caches(tmp_path: Path) -> None:
    folder = save_scripted(tmp_path, "abcdefgh", ends=False)
    edit_json(folder / "config.json", max_position_embeddings=20_000)
    running = Running(str(folder), data_parallel_size=2, max_model_len=20_000, num_gpu_blocks_override=1300)
    url = f"{running.url}/v1/completions"

    def wait_until_idle() -> None:
        """What a client has left in its middle counts for its engine until that knows."""
        patient.wait_until(lambda: running.engine.llm.get_metrics()["num_running"] == 0)

    try:
        with httpx.Client(timeout=patient.SECONDS) as client:
            for is_known in (False, True):
                wait_until_idle()
                body = {"prompt": "x" * 100, "max_tokens": 19_000, "stream": True}
                with client.stream("POST", url, json=body) as stream:
                    lines = stream.iter_lines()
                    next(lines)  # while this one runs, the other goes to the other engine
                    other = client.post(url, json={"prompt": "y" * 100, "max_tokens": 2}).json()
                    cached = other["usage"]["prompt_tokens_details"]["cached_tokens"]
                    assert (cached > 64) == is_known
            wait_until_idle()
            again = client.post(url, json={"prompt": "x" * 100, "max_tokens": 2}).json()
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 64
        assert all(replica.cached for replica in running.engine.llm._engine._replicas)
    finally:
        running.close()
