"""Worker processes on GPUs: NCCL, collectives within CUDA graphs, a device each. Run: pytest -m "gpu or multigpu" """

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm_bench.collectives import time_collectives
from tests.executor.test_mp import is_alive, pid_of
from tests.models.test_moe_gpu import CASES, SIZES
from tests.tiny_models import random_prompts, save_random

PROMPTS = random_prompts([1, 3, 63, 64, 65, 130, 17, 200])
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SEEDED = [SamplingParams(seed=i, max_tokens=24, top_p=0.9, ignore_eos=True) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"head_dim": 64, "max_position_embeddings": 512, "vocab_size": 131}
    return save_random(tmp_path_factory.mktemp("model"), "Qwen3ForCausalLM", **sizes)


def make_llm(folder: Path, **options: Any) -> LLM:
    defaults = {"dtype": "float32", "skip_tokenizer_init": True, "max_num_seqs": 8, "num_gpu_blocks_override": 100}
    return LLM(str(folder), **{**defaults, **options})


def tokens(llm: LLM) -> list[list[list[int]]]:
    """Greedy, seeded, and greedy again: then decode steps of every size have been captured."""
    return [
        [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]
        for params in (GREEDY, SEEDED, GREEDY)
    ]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[list[int]]]:
    with make_llm(folder, device="cuda") as llm:
        return tokens(llm)


def device_of(model: Any) -> str:
    return str(next(model.embed_tokens.parameters()).device)


@pytest.mark.gpu
def test_a_worker_process_on_one_gpu(folder: Path, expected: Any) -> None:
    with make_llm(folder, device="cuda", distributed_executor_backend="mp") as llm:
        assert tokens(llm) == expected


@pytest.mark.multigpu
@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("disable_custom_all_reduce", [False, True])
def test_two_ranks_give_the_tokens_of_one(
    folder: Path, expected: Any, enforce_eager: bool, disable_custom_all_reduce: bool
) -> None:
    """With the collectives captured in the graphs, and without; with the kernel of our own, and with NCCL."""
    options = {"enforce_eager": enforce_eager, "disable_custom_all_reduce": disable_custom_all_reduce}
    with make_llm(folder, device="cuda", tensor_parallel_size=2, **options) as llm:
        assert tokens(llm) == expected
        assert llm.apply_model(device_of) == ["cuda:0", "cuda:1"]
        assert all(milliseconds > 0 for milliseconds in llm.apply_model(partial(time_collectives, 8)))


@pytest.mark.multigpu
@pytest.mark.parametrize("case", ["deepseek-v2", "kimi-linear"])
def test_two_ranks_of_latent_attention_give_the_tokens_of_one(case: str, tmp_path: Path) -> None:
    """Each rank has all latents, its part of the heads and of each expert, and of the layers that keep a state."""
    architecture, config = CASES[case]
    folder = save_random(tmp_path, architecture, **{**SIZES, **config})
    found = []
    for ranks in (1, 2):
        with make_llm(folder, device="cuda", tensor_parallel_size=ranks) as llm:
            found.append(tokens(llm))
    assert found[0] == found[1]


@pytest.mark.multigpu
def test_two_engines_give_the_tokens_of_one(folder: Path, expected: Any) -> None:
    with make_llm(folder, device="cuda", data_parallel_size=2) as llm:
        assert tokens(llm) == expected
        assert llm.apply_model(device_of) == ["cuda:0", "cuda:1"]


@pytest.mark.multigpu
def test_the_cache_is_planned_within_each_card(folder: Path) -> None:
    """All ranks take the size that fits the card with the least memory left."""
    held = torch.empty(2**30, dtype=torch.uint8, device="cuda:1")
    options = {"num_gpu_blocks_override": None, "gpu_memory_utilization": 0.2}
    with make_llm(folder, device="cuda", tensor_parallel_size=2, **options) as llm:
        assert len(set(llm.apply_model(device_of))) == 2
        assert tokens(llm)
    del held


@pytest.mark.multigpu
def test_a_killed_rank_frees_the_memory_of_all(folder: Path) -> None:
    """Also while another rank waits for it within a collective."""
    llm = make_llm(folder, device="cuda", tensor_parallel_size=2)
    tokens(llm)
    pids = llm.apply_model(pid_of)
    os.kill(pids[1], signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="worker 1 was killed by SIGKILL"):
        tokens(llm)
    assert time.monotonic() - start < 60  # far from the 300 s that a message may take
    assert not any(map(is_alive, pids))
