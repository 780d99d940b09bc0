"""What a trace tells, against what the planner did; what becomes of it when things go wrong; the page and the words."""

import gzip
import json
import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.cache_specs import PagedKV
from nanovllm.cli.main import main
from nanovllm.engine.cache_manager import CacheManager
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.request import End
from nanovllm.engine.scheduler_output import NewRow, SchedulerOutput
from nanovllm.tracing.device_clock import HostClock
from nanovllm.tracing.explain import explain
from nanovllm.tracing.page import write_page
from nanovllm.tracing.recorder import DEVICE, ENGINE, QUEUE, ROWS, Recorder
from nanovllm.tracing.trace_file import TraceFile, read_events
from nanovllm.tracing.traced_engine import TracedEngine, TracedScheduler
from tests.engine.fake_device import FakeDevice, check_output, make_request, run
from tests.server.test_page import CHROMIUM
from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, save_random, save_tokenizer


def make_traced(
    path: Path,
    *,
    num_blocks: int = 64,
    max_num_seqs: int = 3,
    budget: int = 16,
    overlap_depth: int = 1,
    **options: Any,
) -> tuple[TracedEngine, FakeDevice]:
    scheduler = TracedScheduler(
        CacheManager(num_blocks, 4, True),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        recorder=Recorder(path),
        **options,
    )
    device = FakeDevice(num_blocks, 4, max_num_seqs, [PagedKV()], 256)
    return TracedEngine(scheduler, device, OutputProcessor(None), overlap_depth, HostClock(overlap_depth == 1)), device


def slices(path: Path, pid: int, tid: int | None = None) -> list[dict[str, Any]]:
    return [e for e in read_events(path) if e["ph"] == "X" and e["pid"] == pid and tid in (None, e["tid"])]


def tokens_by_step(path: Path) -> Counter[tuple[int, int]]:
    """(step, row) -> tokens, from the rows' slices."""
    found: Counter[tuple[int, int]] = Counter()
    for one in slices(path, ROWS):
        args = one["args"]
        numbers = [args["step"]] if "step" in args else range(args["first"], args["last"] + 1)
        for number in numbers:
            found[number, one["tid"]] += args["tokens"] // len(numbers)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_it_has_what_the_planner_planned(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    path = tmp_path / ("run.json.gz" if seed % 2 else "run.json")
    engine, device = make_traced(path, num_blocks=12, overlap_depth=1 + seed % 3)
    beginnings = [[rng.randrange(97) for _ in range(8)] for _ in range(2)]
    requests = [
        make_request(rng.choice(beginnings) + [rng.randrange(97)] * rng.randint(0, 9), rng.randint(1, 14), name=f"r{i}")
        for i in range(12)
    ]
    for i, request in enumerate(requests):
        request.needs_host_tokens = rng.random() < 0.2
        engine.add_request(request)
        if i % 3 == 0:
            engine.step()
    aborted = rng.choice(requests)
    engine.abort(aborted)
    run(engine)
    engine.close()
    for request in requests:
        if request is not aborted:
            check_output(request)

    stats = engine.scheduler.stats
    on_device = slices(path, ENGINE, DEVICE)
    assert [one["args"]["step"] for one in on_device] == list(range(len(device.plans)))
    planned = {
        (number, row): count
        for number, plan in enumerate(device.plans)
        for row, count in zip(plan.rows, plan.num_scheduled_tokens, strict=True)
    }
    assert tokens_by_step(path) == planned
    assert sum(one["args"]["tokens"] for one in on_device) == stats.num_tokens_computed
    events = list(read_events(path))
    assert sum(event["name"] == "preempted" for event in events) == stats.num_preemptions
    waits = [event["args"] for event in events if event["name"] == "waiting" and event["ph"] == "b"]
    admitted = {args["request"]: args["cached"] for args in reversed(waits) if "cached" in args}  # the first time
    assert sum(admitted.values()) == stats.num_prompt_tokens_cached
    assert sum("row" in args for args in waits) == sum(len(plan.new_rows) for plan in device.plans)
    ends = {event["args"]["request"]: event["args"] for event in events if event["name"] == "finished"}
    for request in requests:
        if request is not aborted:
            assert ends[request.request_id]["output"] == len(request.output_token_ids)


def test_one_request_in_words(tmp_path: Path) -> None:
    path = tmp_path / "run.json.gz"
    engine, _ = make_traced(path, num_blocks=8, max_num_seqs=2)
    for name in ("first", "second", "third"):
        engine.add_request(make_request(range(9), 20 if name != "third" else 3, name=name))
    run(engine)
    engine.get_metrics()  # while the engine lives
    second, third = explain([path], "second"), explain([path], "third")
    assert "was preempted for want of blocks" in second and "once more, after it had lost its place" in second
    assert "free KV blocks" in second and "behind request first" in third and "max_num_seqs places" in third
    assert "ended (length): 9 tokens of prompt" in third
    with pytest.raises(ValueError, match="nothing of a request 'fourth'"):
        explain([path], "fourth")
    engine.close()


def test_what_the_head_of_the_queue_waits_for(tmp_path: Path) -> None:
    """Each of the planner's own reasons, when it alone is in the way."""
    cases: dict[str, dict[str, Any]] = {
        "a row": {"max_num_seqs": 1},
        "blocks": {"num_blocks": 4},
        "budget": {"budget": 9},
        "an adapter": {"admits": lambda request, running: not running},
    }
    for reason, options in cases.items():
        path = tmp_path / f"{reason}.json"
        engine, _ = make_traced(path, **options)
        for i, name in enumerate(("first", "second")):
            engine.add_request(make_request(range(10 * i, 10 * i + 9), 4, name=name))
        run(engine)
        engine.close()
        heads = slices(path, ENGINE, QUEUE)
        assert [(one["name"], one["args"]["request"]) for one in heads] == [(reason, "second")], reason


def test_ids_are_data(tmp_path: Path) -> None:
    path, name = tmp_path / "run.json", 'a "quoted" </script> id\n'
    engine, _ = make_traced(path)
    engine.add_request(make_request(range(9), 3, name=name))
    run(engine)
    engine.close()
    assert "9 tokens of prompt" in explain([path], name)
    write_page(path, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("</script>") == 2, "its own two"


def test_an_interrupted_step_and_all_that_follows(tmp_path: Path) -> None:
    """What waits, runs or has ended when a step is torn: all of it goes on, and the trace with it."""
    path = tmp_path / "run.json.gz"
    engine, device = make_traced(path, overlap_depth=2)
    requests = [make_request(range(5 + i), 4 + 4 * i, name=f"r{i}") for i in range(5)]
    for request in requests[:4]:
        engine.add_request(request)
    for _ in range(6):
        engine.step()
    engine.restart([request for request in requests if not request.is_finished])
    device.num_computed = [0] * 3
    run(engine)
    for request in requests:
        check_output(request)
    engine.close()
    events = list(read_events(path))
    assert sum(event["name"] == "restarted" for event in events) == 3
    assert {e["args"]["request"] for e in events if e["name"] == "finished"} == {r.request_id for r in requests}
    assert sum(tokens_by_step(path).values()) == engine.scheduler.stats.num_tokens_computed


def test_a_trace_is_whole_up_to_its_last_flush(tmp_path: Path) -> None:
    path = tmp_path / "run.json.gz"
    file = TraceFile(path)
    file.add('{"ph":"i","name":"one"}')
    file.flush()
    file.add('{"ph":"i","name":"two"}')
    copy = tmp_path / "killed.json.gz"
    copy.write_bytes(path.read_bytes())
    assert [event["name"] for event in read_events(copy)] == ["one"]
    file.close()
    file.close()
    assert [event["name"] for event in read_events(path)] == ["one", "two", "end"]
    assert json.loads(gzip.decompress(path.read_bytes()))[1]["name"] == "two", "it is JSON as a whole"
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="no trace of this engine's"):
        list(read_events(tmp_path / "other.json"))


def test_a_full_disk_ends_the_trace_and_not_the_engine(tmp_path: Path) -> None:
    engine, _ = make_traced(tmp_path / "run.json")
    request = make_request(range(9), 12)
    engine.add_request(request)
    with Path("/dev/full").open("wb", buffering=0) as full:
        engine._recorder._file._file = full
        with pytest.warns(RuntimeWarning, match="the trace .* ends here: .*No space left"):
            run(engine)
    check_output(request)
    engine.close()


def test_ten_minutes_of_the_fastest_steps_have_room_in_20_megabytes(tmp_path: Path) -> None:
    """A fiftieth of them, of 0.58 ms each with times as they vary, and a request of 200 tokens after the other."""
    rng, now, path = random.Random(0), [0.0], tmp_path / "run.json.gz"
    recorder = Recorder(path, clock=lambda: now[0])
    num_steps = 20_000
    plan = SchedulerOutput(new_rows=[], new_blocks=[], num_decodes=1, rows=[0], token_ids=[-1])
    plan.num_computed_tokens, plan.num_scheduled_tokens = [99], [1]
    for number in range(num_steps):
        start = now[0]
        if number % 200 == 0:
            request = make_request(range(50), 200, name=f"request-{number}")
            recorder.waits(request)
            new = NewRow(
                row=0, num_computed_tokens=0, num_prompt_tokens=50, block_ids=[], params=request.params, seed=0,
                stop_token_ids=(),
            )  # fmt: skip
            entering = replace(plan, new_rows=[new])
        step = recorder.planned(entering if number % 200 == 0 else plan, [request], number % 200 > 1)
        parts = [rng.gauss(mean, mean / 20) for mean in (3e-5, 6e-5, 4.3e-4, 6e-5)]
        now[0] += sum(parts)
        recorder.done(step, start + parts[0], start + sum(parts[:3]))
        recorder.stepped(start, (parts[0], parts[1], parts[2]), (1, 0, 500 - number % 200 // 16))
        if number % 200 == 199:
            recorder.ended(request, End("length"))
    recorder.close()
    assert path.stat().st_size * 600 / now[0] < 20e6, f"{path.stat().st_size / num_steps:.1f} bytes a step"


COUNTS = {  # in the tables and with the functions of Perfetto's trace processor
    "num_preemptions": "select count(*) from slice where name = 'preempted'",
    "num_tokens_computed": (
        "select sum(extract_arg(slice.arg_set_id, 'args.tokens')) from slice join thread_track on "
        "slice.track_id = thread_track.id join thread using (utid) where thread.name = 'device'"
    ),
    "num_steps": (
        "select count(*) from slice join thread_track on slice.track_id = thread_track.id join thread using (utid) "
        "where thread.name = 'device'"
    ),
}


def ask_perfetto(path: Path, query: str) -> int:
    """The Python package finds its processor in the network; a binary on the path is taken as it is."""
    api = pytest.importorskip("perfetto.trace_processor")
    binary = shutil.which("trace_processor_shell")
    if binary is None:
        pytest.skip("there is no trace_processor_shell")
    with api.TraceProcessor(str(path), config=api.TraceProcessorConfig(bin_path=binary)) as processor:
        return next(iter(vars(next(iter(processor.query(query)))).values()))


def ask_sqlite(path: Path, query: str) -> int:
    """The same tables, filled by the format's own rules."""
    events = list(read_events(path))
    database = sqlite3.connect(":memory:")
    database.executescript(
        "create table slice (name, ts, dur, track_id, arg_set_id); create table thread_track (id, utid);"
        "create table thread (utid, name);"
    )
    for event in events:
        track = f"{event['pid']}.{event.get('tid')}"
        if event["ph"] == "M" and event["name"] == "thread_name":
            database.execute("insert into thread_track values (?, ?)", (track, track))
            database.execute("insert into thread values (?, ?)", (track, event["args"]["name"]))
        elif event["ph"] in "Xi":
            values = event["name"], event["ts"], event.get("dur", 0), track, json.dumps(event["args"])
            database.execute("insert into slice values (?, ?, ?, ?, ?)", values)
    database.create_function("extract_arg", 2, lambda args, key: json.loads(args).get(key.removeprefix("args.")))
    ((count,),) = database.execute(query)
    return count


@pytest.mark.parametrize("ask", [ask_sqlite, pytest.param(ask_perfetto, marks=pytest.mark.integrations)])
def test_sql_finds_the_schedulers_counts(ask: Callable[[Path, str], int], tmp_path: Path) -> None:
    path = tmp_path / "run.json.gz"
    engine, _ = make_traced(path, num_blocks=10)
    for i in range(6):
        engine.add_request(make_request(range(6), 5 + 3 * i, name=f"r{i}"))
    run(engine)
    metrics = engine.get_metrics()
    engine.close()
    assert metrics["num_preemptions"] > 0
    assert {name: ask(path, query) for name, query in COUNTS.items()} == {name: metrics[name] for name in COUNTS}


def test_the_command_and_an_engine(tmp_path: Path, capsys: Any) -> None:
    model = save_random(tmp_path / "model", vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS)
    save_tokenizer(model)
    path, page = tmp_path / "run.json.gz", tmp_path / "run.html"
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "num_gpu_blocks_override": 64}
    with LLM(str(model), trace=path, **options) as llm:
        llm.generate(["one", "two"], SamplingParams(max_tokens=4, ignore_eos=True, n=2), use_tqdm=False)
        assert "Request 1[1]:" in llm.explain("1") and "4 of output" in llm.explain("1")
        num_tokens = llm.get_metrics()["num_tokens_computed"]
    assert main(["trace", str(path)]) == 0
    assert f"{num_tokens:,.0f} tokens" in capsys.readouterr().out
    assert main(["trace", str(path), "--html", str(page), "--explain", "0"]) == 0
    assert "Request 0[0]:" in capsys.readouterr().out and "https://" not in page.read_text()
    assert main(["trace", str(tmp_path / "none.json")]) == 2
    with pytest.raises(ValueError, match=r"ends in \.json"):
        LLM(str(model), trace="run.txt")
    untraced: Any = SimpleNamespace(config=SimpleNamespace(trace=None))
    with pytest.raises(ValueError, match="make the engine with trace="):
        LLM.explain(untraced, "0")


@pytest.mark.slow
def test_engines_in_other_processes(tmp_path: Path) -> None:
    model = save_random(tmp_path / "model", vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS)
    save_tokenizer(model)
    path = tmp_path / "run.json.gz"
    with LLM(str(model), device="cpu", dtype="float32", data_parallel_size=2, trace=path) as llm:
        llm.generate(["one", "two", "three", "four"], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
        assert all("4 of output" in llm.explain(str(number)) for number in range(4))
    assert all((tmp_path / f"run.{number}.json.gz").exists() for number in range(2)) and not path.exists()


@pytest.mark.integrations
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    path, page_path = tmp_path / "run.json.gz", tmp_path / "run.html"
    engine, _ = make_traced(path, num_blocks=10)
    for i in range(6):
        engine.add_request(make_request(range(6), 5 + 3 * i, name=f"r{i}"))
    run(engine)
    engine.close()
    write_page(path, page_path)
    stats = engine.scheduler.stats
    problems: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 500})
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(page_path.as_uri())
        page.wait_for_selector("#counts[data-tokens]", timeout=60_000)
        assert page.get_attribute("#counts", "data-tokens") == str(stats.num_tokens_computed)
        assert page.get_attribute("#counts", "data-preemptions") == str(stats.num_preemptions)
        page.fill("#request", "r5")
        page.press("#request", "Enter")
        assert "finished: reason length, prompt 6, output 20" in page.text_content("#story")
        page.mouse.move(500, 200)
        page.mouse.wheel(0, -600)
        browser.close()
    assert problems == []
