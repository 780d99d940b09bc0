"""Several engines behind one LLM, each in its own process: the results are those of one engine."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, BeamSearchParams, SamplingParams, StructuredOutputsParams
from nanovllm.executor import children
from tests.executor.test_mp import is_alive, pid_of
from tests.tiny_models import VOCAB_WITH_TOKENIZER, random_prompts, save_random, save_tokenizer

PROMPTS = random_prompts([1, 9, 30, 16, 41, 3, 12, 25])
GREEDY = SamplingParams(temperature=0, max_tokens=8)
VARIED = [
    SamplingParams(max_tokens=8),  # its seed comes from the engine's and its place among the prompts
    SamplingParams(max_tokens=8, n=3, seed=4),
    SamplingParams(temperature=0, max_tokens=12, logprobs=2, prompt_logprobs=1, capture={"layers": [1]}),
    SamplingParams(max_tokens=30, stop=["a", "b", "c", "d", "e", "\x01", "\x02"], seed=1),
    SamplingParams(max_tokens=8, repetition_penalty=1.5, top_k=9, seed=2),
    SamplingParams(max_tokens=30, stop_token_ids=list(range(20)), seed=3),
    SamplingParams(max_tokens=1),
    SamplingParams(temperature=0, max_tokens=4, detokenize=False),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random(tmp_path_factory.mktemp("model"), vocab_size=VOCAB_WITH_TOKENIZER)
    save_tokenizer(folder)
    return folder


def make_llm(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), **{"device": "cpu", "dtype": "float32", "block_size": 8, **options})


@pytest.fixture(scope="module")
def one(folder: Path) -> Iterator[LLM]:
    with make_llm(folder) as llm:
        yield llm


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[LLM]:
    with make_llm(folder, data_parallel_size=2) as llm:
        yield llm


def generate(llm: LLM, params: Any) -> list[Any]:
    """Of each result the prompt, and of each output all but its log-probabilities."""
    return [facts(output) for output in llm.generate(PROMPTS, params, use_tqdm=False)]


def facts(output: Any) -> Any:
    outputs = [(one.index, one.text, one.token_ids, one.finish_reason, one.stop_reason) for one in output.outputs]
    return output.prompt_token_ids, outputs, output.finished


def logprobs(output: Any) -> list[float]:
    entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    return [number for entry in entries for token_id in entry for number in (token_id, entry[token_id].logprob)]


def test_results_are_those_of_one_engine_in_the_prompts_order(folder: Path) -> None:
    with make_llm(folder) as one, make_llm(folder, data_parallel_size=2) as two:  # both new: the same seeds are drawn
        expected = one.generate(PROMPTS, VARIED, use_tqdm=False)
        outputs = two.generate(PROMPTS, VARIED, use_tqdm=False)
        assert list(map(facts, outputs)) == list(map(facts, expected))
        assert logprobs(outputs[2]) == pytest.approx(logprobs(expected[2]), abs=1e-4)
        for output, alone in zip(outputs[2].outputs, expected[2].outputs, strict=True):
            torch.testing.assert_close(output.hidden_states, alone.hidden_states)
        assert isinstance(outputs[3].outputs[0].stop_reason, str)
        assert generate(two, GREEDY) == generate(one, GREEDY)
        metrics = two.get_metrics()
        assert metrics["num_free_blocks"] == metrics["num_blocks"]


@pytest.mark.slow
def test_processes_that_are_not_forked(folder: Path, one: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """As users start them; what the other tests start has imported everything (`tests/forked_children.py`)."""
    monkeypatch.setattr(children, "subprocess", subprocess)
    with make_llm(folder, data_parallel_size=2) as llm:
        assert generate(llm, GREEDY) == generate(one, GREEDY)


def test_both_engines_work(two: LLM) -> None:
    pids = two.apply_model(pid_of)
    assert len({os.getpid(), *pids}) == 3
    two.generate(PROMPTS, GREEDY, use_tqdm=False)
    placed = [replica.num_tokens_left for replica in two._engine._replicas]  # type: ignore[union-attr]
    assert placed == [0, 0]
    ids = [two.add_request(prompt, GREEDY) for prompt in random_prompts([20] * 6, seed=9)]
    placed = [replica.num_tokens_left for replica in two._engine._replicas]  # type: ignore[union-attr]
    assert placed[0] == placed[1] == 3 * 28
    two.abort_request(ids)
    assert not two.has_unfinished_requests()
    assert [replica.num_tokens_left for replica in two._engine._replicas] == [0, 0]  # type: ignore[union-attr]


def test_a_shared_prefix_is_computed_by_one_engine(two: LLM) -> None:
    prefix, *ends = random_prompts([48, 2, 3, 4], seed=5)
    two.reset_prefix_cache()
    before = two.get_metrics()["num_prompt_tokens_cached"]
    for end in ends:
        two.generate([prefix + end], GREEDY, use_tqdm=False)
    assert two.get_metrics()["num_prompt_tokens_cached"] - before == 2 * 48


def test_steps_streams_and_aborts(one: LLM, two: LLM) -> None:
    expected = [output.outputs[0].token_ids for output in one.generate(PROMPTS, GREEDY, use_tqdm=False)]
    texts = [output.outputs[0].text for output in one.generate(PROMPTS, GREEDY, use_tqdm=False)]
    for i, prompt in enumerate(PROMPTS):
        two.add_request(prompt, SamplingParams(temperature=0, max_tokens=8 if i != 4 else 200), str(i))
    results: dict[str, Any] = {}
    while two.has_unfinished_requests():
        for output in two.step():
            results[output.request_id] = output.outputs[0].token_ids
        two.abort_request("4")
    assert [results[str(i)] for i in (0, 1, 2, 3, 5, 6, 7)] == expected[:4] + expected[5:]
    streamed: dict[int, str] = {}
    for output in two.stream(PROMPTS, GREEDY):
        streamed[int(output.request_id)] = streamed.get(int(output.request_id), "") + output.outputs[0].text
    assert [streamed[key] for key in sorted(streamed)] == texts
    assert two.step() == []
    metrics = two.get_metrics()
    assert metrics["num_free_blocks"] == metrics["num_blocks"]


def test_scores_beams_and_forms(one: LLM, two: LLM) -> None:
    options = [" a", " an", " the"]
    assert two.score("This is", options) == pytest.approx(one.score("This is", options), abs=1e-4)
    beams = BeamSearchParams(beam_width=2, max_tokens=4)
    found, expected = (llm.beam_search([PROMPTS[3], PROMPTS[5]], beams) for llm in (two, one))
    assert [[s.tokens for s in output.sequences] for output in found] == [
        [s.tokens for s in output.sequences] for output in expected
    ]
    pytest.importorskip("llguidance")
    form = SamplingParams(max_tokens=12, n=2, seed=1, structured_outputs=StructuredOutputsParams(regex="[a-f]{3,9}"))
    assert generate(two, form) == generate(one, form)


def test_an_interrupted_call_is_forgotten(one: LLM, two: LLM) -> None:
    expected = generate(one, GREEDY)
    stream = two.stream(PROMPTS, SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    stream.close()
    assert not two.has_unfinished_requests()
    assert generate(two, GREEDY) == expected


def test_ctrl_c_loses_nothing_of_other_requests(one: LLM, two: LLM) -> None:
    params = SamplingParams(max_tokens=220, seed=8, ignore_eos=True)  # it outlives the calls that are stopped
    (expected,) = one.generate([PROMPTS[2]], params, use_tqdm=False)
    stream = two.stream([PROMPTS[2]], params)
    found = list(next(stream).outputs[0].token_ids)
    for delay in (0.0, 0.003, 0.01):
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
            while True:
                two.generate(PROMPTS, SamplingParams(max_tokens=2), use_tqdm=False)
    for output in stream:
        found += output.outputs[0].token_ids
    assert found == expected.outputs[0].token_ids
    assert not two.has_unfinished_requests()


def test_bad_input_raises_here_before_anything_is_queued(two: LLM) -> None:
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        two.generate(["a", ""])
    with pytest.raises(TypeError, match="can be imported"):
        two.apply_model(lambda model: 0)
    assert not two.has_unfinished_requests()


@pytest.mark.slow
def test_engines_of_two_ranks_each_and_a_killed_one(folder: Path, one: LLM) -> None:
    """Four workers below two engines; when one dies, all end, and the error says which."""
    expected = generate(one, GREEDY)
    llm = make_llm(folder, data_parallel_size=2, tensor_parallel_size=2, skip_tokenizer_init=False)
    assert generate(llm, GREEDY) == expected
    pids = llm.apply_model(pid_of)
    assert len(set(pids)) == 4
    os.kill(pids[3], signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)replica 1 failed.*worker 1 was killed by SIGKILL"):
        generate(llm, GREEDY)
    assert time.monotonic() - start < 60  # far from the 300 s that a message may take
    deadline = time.monotonic() + 60
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.02)
    with pytest.raises(RuntimeError, match="closed"):
        generate(llm, GREEDY)


def stop(pid: int) -> None:
    """Until it has stopped, a thread of the process may still answer."""
    os.kill(pid, signal.SIGSTOP)
    while Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
        time.sleep(0.01)


def test_a_replica_that_answers_nothing_is_named(folder: Path) -> None:
    """Stopped, it neither ends nor speaks, while the other one goes on. Only a step ends the engine."""
    llm = make_llm(folder, data_parallel_size=2, distributed_timeout_seconds=5)
    generate(llm, GREEDY)
    pid = llm.apply_model(pid_of)[1]
    stop(pid)
    for question in (llm.get_metrics, lambda: llm.apply_model(pid_of)):
        with pytest.raises(TimeoutError, match=r"no answer within 5 s .* from data-parallel replica 1"):
            question()
    os.kill(pid, signal.SIGCONT)
    assert llm.apply_model(pid_of)[1] == pid and len(generate(llm, GREEDY)) == len(PROMPTS)
    stop(pid)
    with pytest.raises(RuntimeError, match=r"no answer within 5 s .* to a step from data-parallel replica 1"):
        generate(llm, GREEDY)
    for call in (llm.get_metrics, lambda: generate(llm, GREEDY)):
        with pytest.raises(RuntimeError, match=r"closed .*no answer within"):
            call()
