"""What is raised in the middle of a step, on a real model: exceptions at lines of the engine, handlers of signals, the
garbage collector, forked children. Afterwards the engine works, with the same tokens, or says that it is closed.
"""

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, RequestOutputKind, SamplingParams
from nanovllm.engine.cache_manager import CacheManager
from tests.engine.test_interruptions import Interruption, Tracer
from tests.llm_checks import check_nothing_is_left
from tests.test_llm import inner_model
from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, save_random, save_tokenizer

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "block_size": 8, "max_num_seqs": 4}
PROMPTS = ["abc", "a longer prompt of some blocks", "x"]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
NUM_POINTS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random(tmp_path_factory.mktemp("random"), vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), **OPTIONS) as llm:
        yield llm


def generate(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def varied() -> list[SamplingParams]:
    """A stream with a stop string, log-probabilities, hidden states and two sequences: all that a step brings."""
    common = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
    return [
        SamplingParams(**common, stop="zz", logprobs=1, output_kind=RequestOutputKind.DELTA),
        SamplingParams(**common, capture={"layers": [0]}, prompt_logprobs=0),
        SamplingParams(**{**common, "temperature": 1.0}, seed=3, n=2, output_kind=RequestOutputKind.FINAL_ONLY),
    ]


def steps(llm: LLM, tracer: Tracer) -> list[Any]:
    """What `step` returns to a caller that calls it again after each interruption, added up by request."""
    names = [llm.add_request(prompt, params) for prompt, params in zip(PROMPTS, varied(), strict=True)]
    deltas: list[Any] = []
    last: dict[str, Any] = {}
    for _ in range(100):
        if not llm.has_unfinished_requests():
            break
        try:
            with tracer:
                outputs = llm.step()
        except Interruption:
            continue
        for output in outputs:
            last[output.request_id] = output
            if output.request_id == names[0]:
                deltas.append(output.outputs[0])
    found: list[Any] = [
        [token_id for piece in deltas for token_id in piece.token_ids],
        "".join(piece.text for piece in deltas),
        [len(entry) for piece in deltas for entry in piece.logprobs],
    ]
    for name in names[1:]:
        output = last[name]
        for completion in output.outputs:
            states = None if completion.hidden_states is None else tuple(completion.hidden_states[0].shape)
            found.append((completion.token_ids, completion.text, completion.finish_reason, states, output.finished))
        found.append(output.prompt_logprobs and len(output.prompt_logprobs))
    return found


def test_steps_that_are_interrupted_anywhere_lose_and_repeat_nothing(llm: LLM) -> None:
    counter = Tracer(10**9)
    expected = steps(llm, counter)
    num_lines = 10**9 - counter.left
    for k in range(1, num_lines, num_lines // NUM_POINTS):
        assert steps(llm, Tracer(k)) == expected, f"interrupted at line {k}"
        check_nothing_is_left(llm)


def test_calls_that_are_interrupted_anywhere_leave_nothing(llm: LLM) -> None:
    expected = generate(llm)
    counter = Tracer(10**9)
    with counter:
        generate(llm)
    num_lines = 10**9 - counter.left
    for k in range(1, num_lines, num_lines // NUM_POINTS):
        with pytest.raises(Interruption), Tracer(k):
            generate(llm)
        llm.step()
        check_nothing_is_left(llm)
    assert generate(llm) == expected


class TooSlow(Exception):
    pass


class Handler:
    def method(self, number: int, frame: Any) -> None:
        raise TooSlow

    __call__ = method


def plain(number: int, frame: Any) -> None:
    raise TooSlow


@pytest.mark.parametrize("handler", [plain, Handler().method, Handler()], ids=["function", "method", "object"])
def test_a_time_limit_by_a_signal_costs_nothing(llm: LLM, handler: Callable[..., None]) -> None:
    """Its exception is an Exception, as an engine's own failure would be."""
    expected = generate(llm)

    def at_once(*_: object) -> None:
        hook.remove()
        signal.raise_signal(signal.SIGALRM)

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        hook = inner_model(llm).norm.register_forward_hook(at_once)
        with pytest.raises(TooSlow):
            generate(llm)
    finally:
        signal.signal(signal.SIGALRM, previous)
    check_nothing_is_left(llm)
    assert generate(llm) == expected


def test_streams_collected_in_mid_step_lose_no_block(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(llm)
    allocate = CacheManager.allocate
    for moment in (1, 4, 9):
        for prompt in PROMPTS:
            cycle: list[Any] = [llm.stream(prompt, GREEDY)]
            cycle.append(cycle)
            next(cycle[0])
            del cycle
        left = [moment]

        def collecting(self: CacheManager, *args: Any, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] == 0:
                gc.collect()
            return allocate(self, *args)

        monkeypatch.setattr(CacheManager, "allocate", collecting)
        assert generate(llm) == expected
        monkeypatch.undo()
        gc.collect()
        check_nothing_is_left(llm)


def test_inside_a_step_requests_can_end_and_nothing_else(llm: LLM) -> None:
    expected = generate(llm)
    errors: list[Exception] = []

    def inside(*_: object) -> None:
        hook.remove()
        llm.abort_request(name)
        for call in (lambda: generate(llm), llm.step, llm.get_metrics, lambda: llm.add_request("a")):
            try:
                call()
            except RuntimeError as error:
                errors.append(error)

    name = llm.add_request("dropped", GREEDY)
    hook = inner_model(llm).norm.register_forward_hook(inside)
    assert generate(llm) == expected
    assert len(errors) == 4 and all("inside one of its own steps" in str(error) for error in errors)
    check_nothing_is_left(llm)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_is_told_and_disturbs_nothing(llm: LLM) -> None:
    expected = generate(llm)
    stream = llm.stream("abc", GREEDY)
    next(stream)
    reading_end, writing_end = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:  # nothing here may reach pytest
        words = []
        for call in (lambda: generate(llm), llm.step, lambda: next(stream), llm.close, stream.close):
            try:
                call()
                words.append("done")
            except RuntimeError as error:
                words.append("made in process" if f"made in process {os.getppid()}" in str(error) else str(error))
            except BaseException as error:
                words.append(repr(error))
        os.write(writing_end, ",".join(words).encode())
        os._exit(0)
    os.close(writing_end)
    with os.fdopen(reading_end) as answer:
        assert answer.read() == ",".join(["made in process"] * 3 + ["done"] * 2)
    os.waitpid(pid, 0)
    assert len(list(stream)) == 7
    assert generate(llm) == expected
    check_nothing_is_left(llm)


def test_threads_that_generate_stream_and_score_at_once_get_what_they_get_alone(llm: LLM) -> None:
    def stream() -> list[int]:
        return [token_id for output in llm.stream(PROMPTS[0], GREEDY) for token_id in output.outputs[0].token_ids]

    def score() -> list[float]:
        return [round(value, 2) for value in llm.score(PROMPTS[1], ["a", "bc"])]

    calls: list[Callable[[], Any]] = [lambda: generate(llm), stream, score]
    expected = [call() for call in calls]
    results: list[Any] = [None] * 6

    def work(i: int) -> None:
        results[i] = [calls[i % 3]() for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results == [[expected[i % 3]] * 3 for i in range(6)]
    check_nothing_is_left(llm)
