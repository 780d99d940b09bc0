"""`complete` and `chat` on a model that recites a known text, so that every printed character is known."""

import io
import json
import signal
import sys
from pathlib import Path

import pytest

from nanovllm.cli.main import main
from nanovllm.cli.streaming import stream_answer
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from tests.tiny_models import save_scripted

SMALL = ["--max-model-len", "200", "--kv-cache-memory-bytes", "10000000", "--device", "cpu", "--temperature", "0"]
TEXT = "Grü, WORLD!"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_scripted(tmp_path_factory.mktemp("scripted"), TEXT, ends=True))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_scripted(tmp_path_factory.mktemp("endless"), "abc", ends=False))


def give_input(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_complete_prints_the_text_and_nothing_else(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complete", "Hello:", "--model", model, *SMALL]) == 0
    captured = capsys.readouterr()
    assert captured.out == TEXT + "\n"
    assert "output tokens" in captured.err


def test_complete_reads_standard_input(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    give_input(monkeypatch, "Hello\n")
    assert main(["complete", "--model", model, "--max-tokens", "3", *SMALL]) == 0
    assert capsys.readouterr().out == "Gr\ufffd\n", "three bytes, and the third is half of an ü"


def test_complete_without_any_prompt_says_so(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    give_input(monkeypatch, "")
    assert main(["complete", "--model", model, *SMALL]) == 2
    assert "no prompt" in capsys.readouterr().err


def test_complete_a_file_as_json(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo\n")
    assert main(["complete", "--model", model, "--file", str(prompts), "--json", "--stop", "WO", *SMALL]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["prompt"] for record in records] == ["one", "two"]
    for record in records:
        assert record["text"] == "Grü, "
        assert record["finish_reason"] == "stop"


def test_several_prompts_are_labelled(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complete", "one", "two", "--model", model, *SMALL]) == 0
    assert capsys.readouterr().out == f"=== 1: one\n{TEXT}\n\n=== 2: two\n{TEXT}\n\n"


def test_chat_answers_each_piped_line_until_exit(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    give_input(monkeypatch, "Hello\n\n/help\nAgain\n/reset\nOnce more\n/exit\nnever\n")
    assert main(["chat", "--model", model, "--system", "Be brief.", *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.count(TEXT) == 3
    assert any("/reset" in line for line in lines)


def test_chat_refuses_a_turn_that_does_not_fit(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    give_input(monkeypatch, "x" * 300 + "\n")
    assert main(["chat", "--model", model, *SMALL]) == 2
    assert "max_model_len" in capsys.readouterr().err


def test_an_interrupt_ends_the_answer_and_nothing_else(endless: str) -> None:
    """Ctrl-C between steps: the partial answer is kept, the engine is empty and works on."""
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 5:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with LLM(endless, device="cpu", max_model_len=200, kv_cache_memory_bytes=10_000_000) as llm:
        answer = stream_answer(llm, "x", SamplingParams(temperature=0.0, max_tokens=None), write)
        assert answer is not None
        assert answer.text == "".join(pieces) == "abcab"
        assert not llm.has_unfinished_requests()
        assert signal.getsignal(signal.SIGINT) == before
        again = stream_answer(llm, "x", SamplingParams(temperature=0.0, max_tokens=3), lambda text: None)
        assert again is not None
        assert again.text == "abc"
