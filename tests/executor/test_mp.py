"""Worker processes: what they compute, and what happens when something goes wrong with one of them."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams
from nanovllm.kernels.triton.common.launch import has_dependent_launch
from tests.executor.rank_process import OPTIONS
from tests.tiny_models import random_prompts, save_random

PROMPTS = random_prompts([1, 9, 30, 16])
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("model"))


def make_llm(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), **{**OPTIONS, **options})


def tokens(llm: LLM, params: Any = GREEDY) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    with make_llm(folder) as llm:
        return tokens(llm)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    """Two ranks that every test may use which leaves them whole."""
    options = {"overlap_depth": 2, "num_gpu_blocks_override": 6, "max_num_batched_tokens": 11, "max_num_seqs": 4}
    with make_llm(folder, tensor_parallel_size=2, **options) as llm:
        yield llm


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.02)


def pid_of(model: Any) -> int:
    return os.getpid()


def note_dependent_launch(model: Any) -> None:
    """From now on `model.answers` says for each step whether a GPU, if there were one, would launch so."""
    torch.cuda.get_device_capability = lambda device: (9, 0)
    model.answers = []
    model.register_forward_pre_hook(lambda *_: model.answers.append(has_dependent_launch(torch.device("cuda"))))


def answers_of(model: Any) -> list[bool]:
    return model.answers


def num_parameters_of(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def fail_in_rank_1(model: Any) -> None:
    if model.lm_head.tp.rank == 1:
        raise KeyError("only here")


def raise_in_later_steps(model: Any) -> None:
    def forward(*_: Any) -> Any:
        raise ArithmeticError("the model of rank 1 gave up")

    if model.lm_head.tp.rank == 1:
        model.layers[1].forward = forward


def hang_in_later_steps(model: Any) -> None:
    model.layers[1].forward = lambda *_: time.sleep(600)


def test_workers_give_the_tokens_of_one_process(llm: LLM, expected: list[list[int]]) -> None:
    """With two steps in flight, chunks and preemption; again from the prefix cache."""
    assert tokens(llm) == expected
    assert tokens(llm) == expected
    metrics = llm.get_metrics()
    assert metrics["num_preemptions"] > 0 and metrics["num_prompt_tokens_cached"] > 0
    assert metrics["num_free_blocks"] == metrics["num_blocks"]


def test_a_function_runs_on_every_workers_model(llm: LLM) -> None:
    pids = llm.apply_model(pid_of)
    assert len({os.getpid(), *pids}) == 3
    of_two = llm.apply_model(num_parameters_of)
    assert of_two[0] == of_two[1]


def test_workers_launch_as_the_engine_was_told(folder: Path) -> None:
    with make_llm(folder, tensor_parallel_size=2, dependent_launch=False) as llm:
        llm.apply_model(note_dependent_launch)
        tokens(llm)
        for answers in llm.apply_model(answers_of):
            assert set(answers) == {False}


def test_a_function_that_raises_is_the_callers_mistake(llm: LLM, expected: list[list[int]]) -> None:
    with pytest.raises(KeyError, match="only here") as caught:
        llm.apply_model(fail_in_rank_1)
    assert "rank 1" in caught.value.__notes__[0] and "fail_in_rank_1" in caught.value.__notes__[0]
    with pytest.raises(TypeError, match="can be imported"):
        llm.apply_model(lambda model: 0)
    assert tokens(llm) == expected


def allow_only_7(token_ids: list[int], logits: Any) -> Any:
    logits = logits.clone()
    logits[:7] = logits[8:] = -float("inf")
    return logits


def test_logits_processors_run_in_the_workers(llm: LLM, folder: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, logits_processors=[allow_only_7])
    assert tokens(llm, params) == [[7, 7, 7]] * len(PROMPTS)
    nameless = SamplingParams(logits_processors=[lambda token_ids, logits: logits])
    with pytest.raises(ValueError, match=r"prompts\[0\]: logits_processors.*can be imported"):
        tokens(llm, nameless)
    with pytest.raises(ValueError, match=r"logits_processors.*can be imported"):
        make_llm(folder, distributed_executor_backend="mp", logits_processors=[lambda token_ids, logits: logits])
    assert not llm.has_unfinished_requests()


def count_and_fail_elsewhere(token_ids: list[int], logits: Any) -> Any:
    """Other numbers in each call, and a failure in every process but the one of rank 0."""
    assert sys.argv[-4] == "0"
    return logits + torch.rand(logits.shape) * 10


def fail_at_once(token_ids: list[int], logits: Any) -> Any:
    raise ArithmeticError("ü" * 2000)


def test_ranks_go_on_with_what_rank_0s_processors_made(llm: LLM, expected: list[list[int]]) -> None:
    """A rank that went another way would spoil, or end, everyone's next steps."""
    odd, bad = (
        SamplingParams(temperature=0, max_tokens=8, logits_processors=[function])
        for function in (count_and_fail_elsewhere, fail_at_once)
    )
    outputs = llm.generate(PROMPTS * 2, [GREEDY, odd, GREEDY, bad, odd, GREEDY, bad, GREEDY], use_tqdm=False)
    assert [index for index, output in enumerate(outputs) if output.outputs[0].finish_reason == "error"] == [3, 6]
    for index in (0, 2, 5, 7):
        assert outputs[index].outputs[0].token_ids == expected[index % len(PROMPTS)]
    assert outputs[3].outputs[0].error.startswith("logits processor fail_at_once failed: ArithmeticError: üüü")
    assert tokens(llm) == expected


def test_an_interrupted_call_leaves_the_workers_in_step(llm: LLM, expected: list[list[int]]) -> None:
    for delay in (0.0, 0.01, 0.03):
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            while True:
                tokens(llm)
        assert not llm.has_unfinished_requests()
        assert tokens(llm) == expected


def test_two_engines_at_once_and_their_end(folder: Path, llm: LLM, expected: list[list[int]]) -> None:
    """close() ends the second engine's process, frees its descriptors, and may be repeated."""
    num_fds = len(os.listdir("/proc/self/fd"))
    other = make_llm(folder, distributed_executor_backend="mp")
    assert tokens(other) == tokens(llm) == expected
    pids = other.apply_model(pid_of)
    other.close()
    other.close()
    assert not any(map(is_alive, pids))
    assert len(os.listdir("/proc/self/fd")) == num_fds
    with pytest.raises(RuntimeError, match="closed"):
        tokens(other)


def test_a_killed_rank_ends_the_engine(folder: Path) -> None:
    llm = make_llm(folder, tensor_parallel_size=2)
    tokens(llm)
    pids = llm.apply_model(pid_of)
    os.kill(pids[1], signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="worker 1 was killed by SIGKILL"):
        tokens(llm)
    assert time.monotonic() - start < 60  # far from the 300 s that a message may take
    assert not any(map(is_alive, pids))
    llm.close()


def test_a_rank_that_raises_ends_the_engine_with_its_traceback(folder: Path) -> None:
    llm = make_llm(folder, tensor_parallel_size=2)
    pids = llm.apply_model(pid_of)
    llm.apply_model(raise_in_later_steps)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)worker 1 failed.*raise ArithmeticError.*rank 1 gave up"):
        tokens(llm)
    assert time.monotonic() - start < 60  # far from the 300 s that a message may take
    assert not any(map(is_alive, pids))


def test_a_rank_that_hangs_is_not_waited_for_longer_than_asked(folder: Path) -> None:
    """The time limit is an option."""
    llm = make_llm(folder, distributed_executor_backend="mp", distributed_timeout_seconds=4)
    pids = llm.apply_model(pid_of)
    llm.apply_model(hang_in_later_steps)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"no answer within 4 s \(distributed_timeout_seconds\)"):
        tokens(llm)
    assert time.monotonic() - start < 300  # it sleeps longer
    assert not any(map(is_alive, pids))


def test_a_bad_checkpoint_raises_what_it_raises_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a worker finds it: what this process would have found before starts none."""
    monkeypatch.setattr("nanovllm.build._rehearse_loading", lambda *_: None)
    folder = save_random(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no tensor 'model\.norm\.weight'") as caught:
        make_llm(folder, distributed_executor_backend="mp")
    assert "worker 0 failed" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 3}, r"num_attention_heads = 4.*3 tensor-parallel ranks"),
        (
            {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": 2},
            "torchrun --nproc-per-node 2",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(
    folder: Path, options: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovllm.executor.mp.start_child", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(ValueError, match=message):
        make_llm(folder, **options)


SCRIPT = """
import os, sys, time
from nanovllm import LLM, SamplingParams
llm = LLM(sys.argv[1], device="cpu", skip_tokenizer_init=True, tensor_parallel_size=2)
llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2), use_tqdm=False)
print(*[child.process.pid for child in llm._engine.executor._children.members], flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_script_needs_no_main_guard_and_leaves_no_orphan_when_killed(folder: Path, tmp_path: Path) -> None:
    """Kill -9 of the parent; neither processes nor shared memory stay."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, script, folder], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(map(is_alive, pids))
        for pid in (parent.pid, *pids):
            maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
            assert all(line.endswith("(deleted)") for line in maps if "/dev/shm/" in line), "this would stay"
        parent.kill()
    wait_until_gone(pids)
