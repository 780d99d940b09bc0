"""The engine on a GPU: kernels, CUDA graphs and overlap give the tokens of the CPU's references. Run: pytest -m gpu"""

import gc
import os
import random
import re
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import SamplingParams, StructuredOutputsParams
from tests.gpu_engine import GREEDY, make_llm, tokens
from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, random_prompts, save_random, save_tokenizer

pytestmark = pytest.mark.gpu

LENGTHS = [1, 3, 63, 64, 65, 130, 17, 200, 64, 5, 90, 128]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    prompts = random_prompts(LENGTHS)
    prompts[8] = prompts[5][:64]  # prefixes of another one
    prompts[10] = prompts[7][:90]
    return prompts


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config: dict[str, Any] = {"head_dim": 64, "max_position_embeddings": 512}
    if request.param == "MistralForCausalLM":
        config["sliding_window"] = 48
    return save_random(tmp_path_factory.mktemp("model"), request.param, **config)


@pytest.fixture(scope="module")
def on_cpu(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    with make_llm(folder, device="cpu", compilation="none") as llm:
        return tokens(llm, prompts)


WAYS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "synchronous": {"overlap_depth": 1},
    "deep": {"overlap_depth": 4},
    "chunks": {"max_num_batched_tokens": 48},
    "no prefix cache": {"enable_prefix_caching": False},
    "preempting": {"num_gpu_blocks_override": 10},
    "small blocks": {"block_size": 16, "num_gpu_blocks_override": 800},
    "three rows": {"max_num_seqs": 3},
    "plain layers": {"compilation": "none"},
    "inductor": {"compilation": "inductor"},
}


@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_equal_the_cpu(folder: Path, prompts: list[list[int]], on_cpu: list[list[int]], way: str) -> None:
    """The equality matrix, cold and with a warm prefix cache."""
    with make_llm(folder, **WAYS[way]) as llm:
        assert tokens(llm, prompts) == on_cpu
        assert tokens(llm, prompts) == on_cpu
        if way == "preempting":
            assert llm.get_metrics()["num_preemptions"] > 0


def test_one_by_one_equals_the_batch(folder: Path, prompts: list[list[int]], on_cpu: list[list[int]]) -> None:
    """The kernels for 1 to 4 rows against those for many."""
    with make_llm(folder, enable_prefix_caching=False) as llm:
        assert [tokens(llm, [prompt])[0] for prompt in prompts] == on_cpu


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_the_small_kernels(folder: Path, dtype: str) -> None:
    """Fused norm and product at 1, 2, 4 and 8 rows: the same tokens as plain layers, but for near ties."""
    prompts = random_prompts([20] * 8, seed=3)
    equal = 0
    with make_llm(folder, dtype=dtype) as fused, make_llm(folder, dtype=dtype, compilation="none") as plain:
        for count in (1, 2, 4, 8):
            pairs = zip(tokens(fused, prompts[:count]), tokens(plain, prompts[:count]), strict=True)
            equal += sum(a[:8] == b[:8] for a, b in pairs)
    assert equal >= 12  # of 15


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def test_dependent_launch_changes_no_bit(tmp_path: Path, architecture: str, enforce_eager: bool) -> None:
    """Tokens and log-probabilities of two engines that take turns, one with it and one without.

    Each of these batch sizes has kernels of its own.
    """
    sizes = {"num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 768, "head_dim": 64, "vocab_size": 1024}
    folder = save_random(tmp_path, architecture, **sizes)
    options = {"dtype": "bfloat16", "max_num_seqs": 40, "enforce_eager": enforce_eager}
    with make_llm(folder, **options) as on, make_llm(folder, dependent_launch=False, **options) as off:
        for count in (1, 3, 8, 40):
            prompts = random_prompts([5 + 3 * i for i in range(count)], vocab_size=1024, seed=count)
            for logprobs in (None, 5):
                params = [
                    SamplingParams(
                        temperature=(0, 0.8)[i % 2], seed=i, max_tokens=24, ignore_eos=True, logprobs=logprobs
                    )
                    for i in range(count)
                ]
                with_it, without = (llm.generate(prompts, params, use_tqdm=False) for llm in (on, off))
                for one, other in zip(with_it, without, strict=True):
                    assert one.outputs[0].token_ids == other.outputs[0].token_ids
                    assert one.outputs[0].logprobs == other.outputs[0].logprobs


def test_seeded_requests_do_not_depend_on_their_batch(folder: Path, prompts: list[list[int]]) -> None:
    """Through captured sampling: alone, in a batch, in other rows, preempted, after a prefix hit."""
    params = [
        SamplingParams(
            temperature=0.8, seed=i, max_tokens=16, ignore_eos=True, top_k=(0, 20)[i % 2], top_p=(1, 0.9)[i // 2 % 2]
        )
        for i in range(len(prompts))
    ]
    with make_llm(folder) as llm:
        together = tokens(llm, prompts, params)
        assert tokens(llm, prompts[::-1], params[::-1]) == together[::-1]
        assert [tokens(llm, [p], s)[0] for p, s in zip(prompts, params, strict=True)] == together
    with make_llm(folder, num_gpu_blocks_override=10) as llm:
        assert tokens(llm, prompts, params) == together


def test_min_tokens_holds_stop_ids_back_behind_the_graph(folder: Path) -> None:
    prompt = random_prompts([12])[0]
    with make_llm(folder) as llm:
        free = tokens(llm, [prompt])[0]
        stop = free[3]
        held = SamplingParams(temperature=0, max_tokens=24, min_tokens=8, stop_token_ids=[stop], ignore_eos=True)
        output = tokens(llm, [prompt], held)[0]
        assert stop not in output[:8] and output[:3] == free[:3]


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 5, 8, 13, 31, 64, 100, 200, 511])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_full_batches_of_every_size(
    tmp_path_factory: pytest.TempPathFactory, max_num_seqs: int, enforce_eager: bool
) -> None:
    """Each output is what the request gives alone, up to float32 rounding that random tiny models do not show."""
    folder = save_random(tmp_path_factory.mktemp("tiny"), "LlamaForCausalLM", num_hidden_layers=1)
    prompts = random_prompts([4] * max_num_seqs, seed=max_num_seqs)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    options = {"max_model_len": 64, "num_gpu_blocks_override": 600, "enforce_eager": enforce_eager}
    with make_llm(folder, max_num_seqs=max_num_seqs, **options) as llm:
        outputs = tokens(llm, prompts, params)
        assert tokens(llm, prompts[-1:], params)[0] == outputs[-1]


def test_soak_with_poisoned_blocks(folder: Path) -> None:
    """1,000 steps of random arrivals, aborts and preemptions; what nobody may read is NaN, and no token changes.

    With dependent launch, the default, where the GPU has it: a kernel that read too early would show here as well.
    """
    rng = random.Random(5)
    options = {"num_gpu_blocks_override": 14, "max_num_seqs": 8}
    with make_llm(folder, **options) as llm:
        pool = llm._engine.scheduler.cache.pool
        runner = llm._engine.executor._runner  # type: ignore[attr-defined]
        caches = [
            cache.data for cache in getattr(runner, "_runner", runner).kv_caches
        ]  # a GraphRunner has a ModelRunner
        shared = random_prompts([70])[0]
        live: dict[str, tuple[list[int], int]] = {}  # prompt and number of tokens
        ended: dict[str, tuple[list[int], int]] = {}
        outputs: dict[str, list[int]] = {}
        for step in count():
            if step < 1000 and rng.random() < 0.25 and len(live) < 20:
                prompt = shared[: rng.choice([0, 64, 70])] + random_prompts([rng.randint(1, 60)], seed=step)[0]
                max_tokens = rng.randint(1, 60)
                params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
                live[llm.add_request(prompt, params, f"r{step}")] = prompt, max_tokens
            if rng.random() < 0.03 and live:
                aborted = rng.choice(list(live))
                llm.abort_request(aborted)
                del live[aborted]
            for output in llm.step():
                if output.finished:
                    outputs[output.request_id] = output.outputs[0].token_ids
                    ended[output.request_id] = live.pop(output.request_id)
            if step % 10 == 0:
                unreadable = [block for block in pool._free if pool._hashes[block] is None]
                for cache in caches:
                    cache[:, unreadable] = float("nan")
            if step >= 1000 and not live:
                break
        assert not llm.has_unfinished_requests()
        assert llm.get_metrics()["num_preemptions"] > 0
        assert pool.num_free_blocks == pool.num_blocks
    with make_llm(folder, device="cpu", compilation="none", enable_prefix_caching=False) as cpu:
        names = rng.sample(sorted(ended), 40)
        params = [SamplingParams(temperature=0, max_tokens=ended[name][1], ignore_eos=True) for name in names]
        assert tokens(cpu, [ended[name][0] for name in names], params) == [outputs[name] for name in names]


def test_memory_stays_inside_the_plan_and_comes_back(folder: Path) -> None:
    """A full step of the largest size after planning at half the card; nothing is left after close()."""

    def allocated() -> int:
        """cuBLAS's work space, one for each stream that ever multiplied, is the process's and not the engine's."""
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        return torch.cuda.memory_allocated()

    before = allocated()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    # What the card has in use is no measure of this engine where others come and go.
    if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
        pytest.skip("other pytest workers share the card: run this test without -n")
    if total - free - torch.cuda.memory_reserved() > 2**31:  # of that, our own context and modules take up to half
        pytest.skip(f"another process uses the card: {(total - free) / 2**30:.1f} GiB are in use before the test")
    with make_llm(
        folder, num_gpu_blocks_override=None, gpu_memory_utilization=0.5, max_num_seqs=64, max_num_batched_tokens=8192
    ) as llm:
        params = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=8, ignore_eos=True)
        llm.generate(random_prompts([128] * 64), params, use_tqdm=False)
        free, _ = torch.cuda.mem_get_info()
        assert total - free <= 0.51 * total
        assert llm.get_metrics()["execute_seconds"] > 0
    assert allocated() <= before * 1.01 + 2**20


def test_hidden_states_beside_requests_that_keep_their_graphs(folder: Path, prompts: list[list[int]]) -> None:
    """A step with captures is split; tokens are as without, and states as the CPU computes them."""
    capturing = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, capture={"layers": [0, 1]})
    scoring = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2)
    params = [(capturing, GREEDY, scoring)[i % 3] for i in range(len(prompts))]
    with make_llm(folder, device="cpu", compilation="none") as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
    with make_llm(folder) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for output, wanted in zip(outputs, expected, strict=True):
        got, want = output.outputs[0], wanted.outputs[0]
        assert got.token_ids == want.token_ids
        assert (got.logprobs is None) == (want.logprobs is None)
        for entry, reference in zip(got.logprobs or [], want.logprobs or [], strict=True):
            assert {token: logprob.rank for token, logprob in entry.items()} == {
                token: logprob.rank for token, logprob in reference.items()
            }
        for layer, states in (want.hidden_states or {}).items():
            torch.testing.assert_close(got.hidden_states[layer], states, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("overlap_depth", [1, 2])
def test_structured_outputs_follow_their_form_beside_others(tmp_path: Path, overlap_depth: int) -> None:
    pytest.importorskip("llguidance")
    save_random(tmp_path, vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS, head_dim=64)
    save_tokenizer(tmp_path)
    form = SamplingParams(
        n=4, seed=2, max_tokens=40, structured_outputs=StructuredOutputsParams(regex="([a-f]{2,6} ){2}[g-k]{2,4}")
    )
    with make_llm(tmp_path, skip_tokenizer_init=False, overlap_depth=overlap_depth) as llm:
        outputs = llm.generate(["one", "two", "free"], [form, form, GREEDY], use_tqdm=False)
    for output in outputs[:2]:
        for completion in output.outputs:
            assert re.fullmatch("([a-f]{2,6} ){2}[g-k]{2,4}", completion.text), completion.text
    assert len(outputs[2].outputs[0].token_ids) == 24
