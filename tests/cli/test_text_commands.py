"""`complete` and `chat` on a model that recites a known text, so that every printed character is known."""

import io
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.cli.main import main
from nanovllm.cli.streaming import stream_answer
from nanovllm.llm import LLM
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from tests.lora.random_adapters import save
from tests.tiny_models import VOCAB_WITH_TOKENIZER, save_scripted

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


@pytest.mark.parametrize("command", ["complete", "chat"])
def test_with_an_adapter(
    command: str,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that makes a Z the likeliest byte after any."""
    b = torch.zeros(VOCAB_WITH_TOKENIZER, 1)
    b[ord("Z")] = 100.0
    head = "base_model.model.lm_head.lora_"
    adapter = save(tmp_path, {f"{head}A.weight": torch.ones(1, VOCAB_WITH_TOKENIZER), f"{head}B.weight": b}, 1, 1)
    give_input(monkeypatch, "Hello")
    assert main([command, "--model", model, "--lora", str(adapter), "--max-tokens", "4", *SMALL]) == 0
    assert capsys.readouterr().out.strip() == "ZZZZ"


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


def test_json_lines_are_written_as_answers_end(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time here, so what an interruption finds done is there; `index` says which prompt it was."""
    written: list[str] = []
    step = LLM.step

    def watched(llm: LLM) -> list[RequestOutput]:
        written.append(capsys.readouterr().out)
        if "".join(written).count("\n") == 2:
            raise KeyboardInterrupt
        return step(llm)

    monkeypatch.setattr(LLM, "step", watched)
    assert main(["complete", "a", "b", "c", "--json", "--model", model, "--max-num-seqs", "1", *SMALL]) == 130
    records = [json.loads(line) for line in "".join(written).splitlines()]
    assert [(record["index"], record["prompt"], record["text"]) for record in records] == [
        (0, "a", TEXT),
        (1, "b", TEXT),
    ]


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_named_with_its_remedy(
    tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    assert main(["complete", "--file", str(path)]) == 2
    shown = capsys.readouterr().err
    assert repr(str(path)) in shown and "[Errno" not in shown
    assert ("--file takes" if content is None else "UTF-8") in shown


def test_the_start_is_told_in_one_line_unless_quiet(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["complete", "x", "--model", model, "--device", "cpu", "--dtype", "float32", "--max-tokens", "2"]
    cache = ["--max-model-len", "64", "--num-gpu-blocks-override", "20", "--block-size", "16"]
    assert main([*small, *cache]) == 0
    start, summary = capsys.readouterr().err.splitlines()
    assert start.startswith(
        "[cpu, float32, KV cache of 320 tokens: 5 x 64 at once, or more that are shorter; ready in "
    )
    assert "first token after" in summary
    assert main([*small, *cache, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("Gr\n", "")


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


@pytest.mark.parametrize("flags", [["MODEL"], ["--model", "MODEL"]])
def test_chat_takes_the_model_as_an_argument_or_a_flag(
    model: str, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    give_input(monkeypatch, "Hello\n")
    assert main(["chat", *(model if flag == "MODEL" else flag for flag in flags), *SMALL]) == 0
    assert TEXT in capsys.readouterr().out


def test_chat_takes_one_model(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", model, "--model", "demo"]) == 2
    assert "give the model once" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["template", "step"])
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_a_turn_of_chat_and_the_next_goes_on(
    model: str, where: str, times: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the first turn, whose imports take longer than its answer; a second Ctrl-C takes effect at once."""
    lines = iter(["first", "second", "/exit"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    name = "preprocess_chat" if where == "template" else "step"
    original, calls = getattr(LLM, name), []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        for _ in range(times if len(calls) == 1 else 0):
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(LLM, name, interrupted)
    assert main(["chat", model, *SMALL]) == 0
    assert capsys.readouterr().out.count(TEXT) == 1


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
