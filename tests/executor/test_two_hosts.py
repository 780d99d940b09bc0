"""Two hosts: torchrun on each of two network namespaces, joined by a cable, with one rank of a model on each.

Needs root and the command `ip`; skipped elsewhere.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.executor.external import num_ranks_here
from tests.executor.rank_process import OPTIONS
from tests.executor.test_external import SCRIPT
from tests.tiny_models import random_prompts, save_random

ADDRESSES = ("10.213.77.1", "10.213.77.2")


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str]]]:
    """(namespace, network device) of each."""
    names = [(f"nano{os.getpid()}{letter}", f"nv{os.getpid()}{letter}") for letter in "ab"]
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    try:
        for namespace, _ in names:
            made = subprocess.run(["ip", "netns", "add", namespace], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        (one, cable), (other, end) = names
        ip("link", "add", cable, "netns", one, "type", "veth", "peer", "name", end, "netns", other)
        for (namespace, device), address in zip(names, ADDRESSES, strict=True):
            ip("-n", namespace, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", namespace, "link", "set", device, "up")
            ip("-n", namespace, "link", "set", "lo", "up")
        yield names
    finally:
        for namespace, _ in names:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.mark.slow
def test_two_hosts_give_the_tokens_of_one_process(hosts: list[tuple[str, str]], tmp_path: Path) -> None:
    folder, prompts = save_random(tmp_path / "model"), random_prompts([3, 20])
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    arguments = [json.dumps(argument) for argument in (str(folder), prompts, OPTIONS, str(tmp_path))]
    running = []
    for number, (namespace, device) in enumerate(hosts):
        place = ["--nnodes=2", f"--node-rank={number}", "--nproc-per-node=1", f"--local-addr={ADDRESSES[number]}"]
        meeting = [f"--master-addr={ADDRESSES[0]}", "--master-port=29513"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *place, *meeting, str(script), *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        environment["GLOO_SOCKET_IFNAME"] = device
        running.append(subprocess.Popen(["ip", "netns", "exec", namespace, *torchrun], env=environment))
    with LLM(str(folder), **OPTIONS) as llm:
        outputs = llm.generate(prompts, SamplingParams(seed=5, max_tokens=8), use_tqdm=False)
    try:
        assert [process.wait(timeout=240) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
            process.wait()
    for rank in range(2):
        tokens = json.loads((tmp_path / f"{rank}.json").read_text())
        assert tokens == [output.outputs[0].token_ids for output in outputs]


def test_a_host_needs_devices_for_its_own_ranks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = EngineConfig(model="m", tensor_parallel_size=16, distributed_executor_backend="external_launcher")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert num_ranks_here(launched) == 8  # type: ignore[arg-type]
    assert num_ranks_here(EngineConfig(model="m", tensor_parallel_size=4)) == 4  # type: ignore[arg-type]


def test_pipeline_stages_and_vllms_own_hosts_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="pipeline parallelism is not supported"):
        EngineConfig(model="m", pipeline_parallel_size=2)
    with pytest.raises(TypeError, match="torchrun"):
        EngineConfig(model="m", nnodes=2)
    with pytest.raises(ValueError, match="prefix_store needs one planner"):
        EngineConfig(model="m", prefix_store="x", distributed_executor_backend="external_launcher")
