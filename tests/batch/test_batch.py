"""`nanovllm batch` in this process, on a tiny random model."""

import asyncio
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nanovllm.async_llm import AsyncLLM
from nanovllm.batch import job
from nanovllm.batch.columns import params_over, read_params
from nanovllm.batch.tables import Row, open_table
from nanovllm.cli.main import main
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from nanovllm.structured_outputs import StructuredOutputsParams
from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, save_random, save_tokenizer

OPTIONS = ["--device", "cpu", "--dtype", "float32", "--num-gpu-blocks-override", "64", "--max-num-seqs", "2"]
NUM_ROWS = 7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = save_random(tmp_path_factory.mktemp("model"), vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [{"id": f"r{number}", "prompt": f"question {number}"} for number in range(NUM_ROWS)]
    return write_lines(tmp_path / "in.jsonl", rows)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def batch(source: Path, out: Path, model: str, *more: str, max_tokens: int = 6) -> int:
    return main(["batch", str(source), str(out), "--model", model, "--max-tokens", str(max_tokens), *OPTIONS, *more])


def test_rows_are_answered_in_order_as_generate_would(model: str, questions: Path, capsys: Any) -> None:
    out = questions.with_name("out.jsonl")
    assert batch(questions, out, model, "--seed", "3") == 0
    rows = read_lines(out)
    assert [row["id"] for row in rows] == [f"r{number}" for number in range(NUM_ROWS)]
    with LLM(model, device="cpu", dtype="float32", num_gpu_blocks_override=64, max_num_seqs=2, seed=3) as llm:
        outputs = llm.generate([row["prompt"] for row in rows], SamplingParams(max_tokens=6), use_tqdm=False)
    assert [row["generated_text"] for row in rows] == [output.outputs[0].text for output in outputs]
    assert [row["num_prompt_tokens"] for row in rows] == [len(output.prompt_token_ids) for output in outputs]
    assert all(row["error"] is None for row in rows)
    assert (
        f"7 rows; 0 of 7 with an error; {sum(len(o.prompt_token_ids) for o in outputs)} prompt"
        in capsys.readouterr().err
    )


def test_errors_stay_with_their_row(model: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": "good"},
        "{broken",
        {"text": "another column"},
        {"prompt": ""},
        {"prompt": "x" * 5000},
        {"prompt": "good", "sampling_params": {"temperature": -1}},
        {"prompt": "good", "sampling_params": {"temprature": 1}},
        {"prompt": "good", "sampling_params": {"n": 2}},
        {"prompt": "good", "sampling_params": {"max_tokens": 2, "logit_bias": {"97": 100}, "temperature": 0}},
        {"prompt": [1, 2, 3]},
    ]
    out = tmp_path / "out.jsonl"
    assert batch(write_lines(tmp_path / "in.jsonl", rows), out, model) == 0
    answers = read_lines(out)
    expected = [
        None, "line 2 is no JSON", "no column 'prompt'", "is empty", "max_model_len", "temperature", "'temperature'?",
        "'n'", None, None,
    ]  # fmt: skip
    for answer, words in zip(answers, expected, strict=True):
        assert (answer["error"] is None) == (words is None)
        assert words is None or words in answer["error"]
        assert (answer["generated_text"] is None) == (words is not None)
    assert answers[8]["generated_text"] == "aa"
    page = (tmp_path / "out.jsonl.html").read_text()
    assert "<th>failed<td>7" in page and "<td>1<td><code>line 2 is no JSON" in page and "share of the floor" in page


def test_a_rows_parameters_as_arrow_has_them() -> None:
    """Each name of any row is in all of them."""
    own = read_params(
        {"logit_bias": {"97": 2, "98": None}, "structured_outputs": {"choice": ["a"], "regex": None}, "n": None}
    )
    params = params_over(SamplingParams(temperature=0.5), own, 7)
    assert params == SamplingParams(
        temperature=0.5, logit_bias={97: 2}, structured_outputs=StructuredOutputsParams(choice=["a"]), seed=7
    )
    assert params_over(SamplingParams(seed=1), {}, 7).seed == 1 and params_over(params, {"seed": 0}, 7).seed == 0
    with pytest.raises(TypeError, match="must be an object, got 3"):
        read_params(3)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_conversations_in_tables(suffix: str, model: str, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    columns = {"talk": json.dumps(messages), "sampling_params": '{"max_tokens": 3}'}
    source = tmp_path / f"in{suffix}"
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**columns, "talk": messages}]), source)
    else:
        source.write_text(
            "talk,sampling_params\n" + ",".join(f'"{v}"' for v in (v.replace('"', '""') for v in columns.values()))
        )
    out = tmp_path / f"out{suffix}"
    assert batch(source, out, model, "--messages-column", "talk", "--temperature", "0") == 0
    (row,) = open_table(out).rows()
    with LLM(model, device="cpu", dtype="float32", num_gpu_blocks_override=64, max_num_seqs=2) as llm:
        (answer,) = llm.chat([messages], SamplingParams(max_tokens=3, temperature=0), use_tqdm=False)
    assert row.fields["generated_text"] == answer.outputs[0].text
    assert int(row.fields["num_generated_tokens"]) == 3
    assert row.fields["sampling_params"] == columns["sampling_params"]


def test_openai_lines(model: str, tmp_path: Path) -> None:
    pytest.importorskip("starlette")

    def line(name: str, url: str, **body: Any) -> dict[str, Any]:
        return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "tiny", "max_tokens": 3, **body}}

    rows = [
        line("a", "/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}], n=2),
        line("b", "/v1/completions", prompt=["one", "two"] * 10),
        line("c", "/v1/completions", prompt="x", temperature=-1),
        line("d", "/v1/embeddings", input="x"),
        "no JSON",
    ]
    source = write_lines(tmp_path / "in.jsonl", rows)
    for name in ("out.jsonl", "again.jsonl"):
        arguments = ["batch", str(source), str(tmp_path / name), "--model", model, "--served-model-name", "tiny"]
        assert main([*arguments, *OPTIONS]) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()
    chat, texts, bad, unknown, broken = read_lines(tmp_path / "out.jsonl")
    assert [row["custom_id"] for row in (chat, texts, bad, unknown, broken)] == ["a", "b", "c", "d", None]
    assert chat["response"]["status_code"] == 200
    assert [choice["index"] for choice in chat["response"]["body"]["choices"]] == [0, 1]
    assert len(texts["response"]["body"]["choices"]) == 20, "more than are in flight otherwise"
    assert bad["response"]["status_code"] == 400
    assert "temperature" in bad["response"]["body"]["error"]["message"]
    assert "/v1/embeddings" in unknown["error"]["message"]
    assert "no JSON" in broken["error"]["message"]
    page = (tmp_path / "out.jsonl.html").read_text()
    assert "<th>failed<td>3" in page and "length 22" in page


def test_an_engine_that_ends_is_no_answer(model: str) -> None:
    pytest.importorskip("starlette")
    from nanovllm.batch.openai_lines import OpenAILinesJob

    body = {"model": "tiny", "prompt": "x"}
    row = Row(0, b"", {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body})

    async def ask_after_the_end() -> None:
        async with AsyncLLM(model, device="cpu", num_gpu_blocks_override=64) as engine:
            job = OpenAILinesJob(engine, ["tiny"])
        await job.answer(row)

    with pytest.raises(RuntimeError, match="the engine has ended"):
        asyncio.run(ask_after_the_end())


class Killed(BaseException):
    """In place of a signal, at a chosen line."""


@pytest.mark.parametrize("moment", ["in mid-run", "OUT is half written", "OUT is written", "OUT is in its place"])
def test_whenever_it_ends_early_it_goes_on(
    moment: str, model: str, questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    expected, out = questions.with_name("expected.jsonl"), questions.with_name("out.jsonl")
    assert batch(questions, expected, model) == 0
    computed: list[int] = []

    def die(*_: Any, **__: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "in mid-run":
            append = job.Journal.append

            def append_three(journal: Any, row: Any, result: Mapping[str, Any]) -> None:
                if len(computed) == 3:
                    raise Killed
                append(journal, row, result)
                computed.append(row.number)

            patch.setattr(job.Journal, "append", append_three)
        elif moment == "OUT is half written":
            patch.setattr(os, "fsync", die)
        elif moment == "OUT is written":
            patch.setattr(Path, "replace", die)
        else:
            patch.setattr(job.Journal, "conclude", die)
        with pytest.raises(Killed):
            batch(questions, out, model)
    assert out.exists() == (moment == "OUT is in its place")
    capsys.readouterr()
    assert batch(questions, out, model) == 0
    report = capsys.readouterr().err
    assert ("3 of them before; 0 of 4" if computed else "7 of them before; 0 of 0") in report
    assert out.read_bytes() == expected.read_bytes()
    left = {path.name for path in questions.parent.iterdir() if path.name.startswith("out")}
    assert left == {"out.jsonl", "out.jsonl.journal", "out.jsonl.html"}
    page = out.with_name("out.jsonl.html").read_text()
    assert f"<td>7, {4 if computed else 0} of them in this run" in page, "the report is of all rows"


def test_done_is_done(model: str, questions: Path, capsys: Any) -> None:
    out = questions.with_name("out.jsonl")
    assert batch(questions, out, model) == 0
    before = out.read_bytes()
    assert batch(questions, out, model) == 0
    assert "is complete" in capsys.readouterr().err
    write_lines(questions, [{"prompt": "new"}])
    assert batch(questions, out, model) == 2
    assert "has changed" in capsys.readouterr().err
    assert batch(questions, out, model, max_tokens=5) == 2
    assert "another sampling options" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert batch(questions, out, model, "--restart") == 0
    assert [row["prompt"] for row in read_lines(out)] == ["new"]


def test_another_model_is_noticed(model: str, questions: Path, tmp_path: Path, capsys: Any) -> None:
    other = save_random(tmp_path / "other", vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS, seed=1)
    save_tokenizer(other)
    out = questions.with_name("out.jsonl")
    assert batch(questions, out, model) == 0
    assert batch(questions, out, str(other)) == 2
    assert "another model" in capsys.readouterr().err


def test_a_full_disk_while_out_is_written(model: str, questions: Path, monkeypatch: Any, capsys: Any) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = questions.with_name("out.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert batch(questions, out, model) == 2
    message = capsys.readouterr().err
    assert "No space left" in message and "All 7 rows are done and kept" in message
    assert not out.exists()
    assert batch(questions, out, model) == 0


@pytest.mark.parametrize(
    ("rows", "arguments", "words"),
    [
        ([{"question": "a"}], [], "no column 'prompt' or 'messages'"),
        ([{"question": "a"}], ["--prompt-column", "q"], "no column 'q'; it has 'question'"),
        ([{"prompt": "a", "error": 1}], [], "a column 'error', which results are written to"),
        (["nothing"], [], "no row that can be read"),
        ([], [], "no row that can be read"),
        ([{"prompt": "a"}], ["--prompt-column", "prompt", "--messages-column", "prompt"], "not both"),
        ([{"custom_id": "a", "url": "u", "body": {}}], [], "leave out max_tokens"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    rows: list[Any], arguments: list[str], words: str, tmp_path: Path, capsys: Any
) -> None:
    source = write_lines(tmp_path / "in.jsonl", rows)
    assert batch(source, tmp_path / "out.jsonl", str(tmp_path / "no model"), *arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl.journal").exists()


def test_files_that_are_not_there_or_in_the_way(model: str, questions: Path, tmp_path: Path, capsys: Any) -> None:
    for source, out, words in [
        (tmp_path / "none.jsonl", tmp_path / "out.jsonl", "none.jsonl: No such file"),
        (questions, tmp_path / "nowhere" / "out.jsonl", "there is no folder"),
        (questions, questions, "the same file"),
        (questions, write_lines(tmp_path / "precious.jsonl", ["mine"]), "exists, and is of no job"),
    ]:
        assert batch(source, out, model) == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "precious.jsonl").read_text() == "mine\n"
