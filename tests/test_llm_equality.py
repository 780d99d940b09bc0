"""The same tokens however the engine runs: overlap, chunks, prefix cache, batches, preemption, rows, other seeds."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from tests.tiny_models import random_prompts, save_random

LENGTHS = [1, 7, 8, 9, 30, 16, 41, 3, 24, 2]
PROMPTS = random_prompts(LENGTHS)
PROMPTS[8] = PROMPTS[6][:24]  # a prefix of another one
PROMPTS[9] = PROMPTS[6][:32] + PROMPTS[9]
NUM_OUTPUT = 14


def make_llm(folder: Path, **options: Any) -> LLM:
    defaults = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "block_size": 8}
    return LLM(str(folder), **{**defaults, **options})


def tokens(llm: LLM, prompts: list[list[int]], params: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


def sampled(seed: int | None, **options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": seed, "max_tokens": NUM_OUTPUT, **options})


# Every filter, alone and together, and greedy between them.
MIXED = [
    sampled(0),
    sampled(1, temperature=0.3),
    sampled(2, top_k=5),
    sampled(3, top_p=0.7),
    sampled(4, min_p=0.05),
    SamplingParams(temperature=0, max_tokens=NUM_OUTPUT),
    sampled(5, top_k=20, top_p=0.9, min_p=0.01, temperature=1.7),
    sampled(2**64 - 1),
    sampled(-1, min_tokens=10, stop_token_ids=[1, 2, 3, 4, 5]),
    sampled(2**40, stop_token_ids=[50]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("model"), "Qwen3ForCausalLM", num_key_value_heads=1)


@pytest.fixture(scope="module")
def greedy_alone(folder: Path) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT)
    with make_llm(folder, enable_prefix_caching=False, max_num_seqs=1) as llm:
        return [tokens(llm, [prompt], params)[0] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def sampled_alone(folder: Path) -> list[list[int]]:
    """Each request in an engine that has run nothing else."""
    results = []
    for prompt, params in zip(PROMPTS, MIXED, strict=True):
        with make_llm(folder, enable_prefix_caching=False, max_num_seqs=1) as llm:
            results += tokens(llm, [prompt], params)
    return results


WAYS = [
    dict(zip(("overlap_depth", "max_num_batched_tokens", "enable_prefix_caching", "num_blocks"), way, strict=True))
    for way in itertools.product((1, 2), (1000, 11), (True, False), (None, 9))
]


def options_of(way: dict[str, Any]) -> dict[str, Any]:
    options = {"max_num_seqs": 8, **way}
    num_blocks = options.pop("num_blocks")
    return options if num_blocks is None else {**options, "num_gpu_blocks_override": num_blocks}


def name_of(way: dict[str, Any]) -> str:
    depth, budget, caching, num_blocks = way.values()
    return f"depth{depth}-budget{budget}-{'cache' if caching else 'nocache'}-{num_blocks or 'many'}blocks"


@pytest.mark.parametrize("compilation", ["none", "inductor"])
def test_every_form_of_the_layers_gives_the_same_tokens(
    folder: Path, greedy_alone: list[list[int]], compilation: str
) -> None:
    """Plain PyTorch and torch.compile beside the CPU kernels that all other tests run with."""
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT)
    with make_llm(folder, compilation=compilation) as llm:
        assert tokens(llm, PROMPTS, params) == greedy_alone


@pytest.mark.parametrize("way", WAYS, ids=name_of)
def test_every_way_of_running_gives_the_same_tokens(
    folder: Path, greedy_alone: list[list[int]], sampled_alone: list[list[int]], way: dict[str, Any]
) -> None:
    """Greedy and seeded; cold, with a warm prefix cache, in another order, one by one."""
    greedy = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT)
    with make_llm(folder, **options_of(way)) as llm:
        assert tokens(llm, PROMPTS, greedy) == greedy_alone
        num_preemptions = llm.get_metrics()["num_preemptions"]
        assert tokens(llm, PROMPTS[::-1], greedy) == greedy_alone[::-1]
        assert tokens(llm, PROMPTS, MIXED) == sampled_alone
        assert tokens(llm, PROMPTS[::-1], MIXED[::-1]) == sampled_alone[::-1]
        for prompt, params, expected in zip(PROMPTS[:4], MIXED, sampled_alone, strict=False):
            assert tokens(llm, [prompt], params) == [expected]
        metrics = llm.get_metrics()
        assert metrics["num_free_blocks"] == metrics["num_blocks"]
    assert (num_preemptions > 0) == (way["num_blocks"] is not None)
    assert (metrics["num_prompt_tokens_cached"] > 0) == way["enable_prefix_caching"]


@pytest.mark.parametrize("overlap_depth", [1, 2])
def test_a_seeded_request_does_not_depend_on_other_seeds(
    folder: Path, sampled_alone: list[list[int]], overlap_depth: int
) -> None:
    """Others with the same seed, other seeds, none; joining it in any row, arriving later, and leaving early."""
    for row, others in itertools.product((0, 3, 5), ("same", "other", None)):
        with make_llm(folder, overlap_depth=overlap_depth, max_num_seqs=6) as llm:
            prompts = [PROMPTS[i % 10] for i in range(row + 1, row + 6)]
            prompts.insert(row, PROMPTS[6])
            seeds = [{"same": 5, "other": i, None: None}[others] for i in range(6)]
            params = [sampled(seed, max_tokens=2 + i) for i, seed in enumerate(seeds)]
            params[row] = MIXED[6]
            assert tokens(llm, prompts, params)[row] == sampled_alone[6]


def test_seeded_requests_that_arrive_one_by_one(folder: Path, sampled_alone: list[list[int]]) -> None:
    """With a cache that preempts, so rows change hands all the time."""
    with make_llm(folder, overlap_depth=2, num_gpu_blocks_override=9, max_num_seqs=4) as llm:
        results = {}
        waiting = list(enumerate(zip(PROMPTS, MIXED, strict=True)))
        while waiting or llm.has_unfinished_requests():
            if waiting:
                index, (prompt, params) = waiting.pop(0)
                llm.add_request(prompt, params, str(index))
            for output in llm.step():
                results[int(output.request_id)] = output.outputs[0].token_ids
        assert llm.get_metrics()["num_preemptions"] > 0
    assert [results[index] for index in range(len(PROMPTS))] == sampled_alone


def test_the_same_prompt_with_different_seeds_differs(folder: Path) -> None:
    """And the same seed gives the same tokens within a batch."""
    with make_llm(folder, max_num_seqs=32) as llm:
        outputs = tokens(llm, [PROMPTS[4]] * 24, [sampled(i // 2) for i in range(24)])
        assert outputs[::2] == outputs[1::2]
        assert len({tuple(output) for output in outputs}) == 12


def test_requests_without_a_seed_follow_the_engines_seed(folder: Path) -> None:
    params = SamplingParams(max_tokens=NUM_OUTPUT)
    results = []
    for seed in (0, 0, 1):
        with make_llm(folder, seed=seed) as llm:
            results.append([tokens(llm, [PROMPTS[4]] * 3, params) for _ in range(2)])
    assert results[0] == results[1]
    everything = [tuple(output) for result in (results[0], results[2]) for call in result for output in call]
    assert len(set(everything)) == 12


def test_one_long_request_preempts_and_resumes_several_times(folder: Path, greedy_alone: list[list[int]]) -> None:
    """Each of eight requests may need half of the cache; the oldest is never the one to wait."""
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    prompts = [PROMPTS[i % 10][:8] + [i] for i in range(8)]
    with make_llm(folder, max_num_seqs=1) as llm:
        expected = tokens(llm, prompts, params)
    with make_llm(folder, num_gpu_blocks_override=28, max_num_seqs=8) as llm:
        finished = []
        for i, prompt in enumerate(prompts):
            llm.add_request(prompt, params, str(i))
        results = {}
        while llm.has_unfinished_requests():
            for output in llm.step():
                results[output.request_id] = output.outputs[0].token_ids
                if output.finished:
                    finished.append(int(output.request_id))
        assert llm.get_metrics()["num_preemptions"] >= 4
    assert finished == sorted(finished)
    assert [results[str(i)] for i in range(8)] == expected


SIZES = [*range(1, 65), 100, 200, 511]
LIMITS = [1, 2, 3, 16, 17, 64, 511]


def test_full_batches_at_every_size(tmp_path: Path) -> None:
    """1 to 64, 100, 200 and 511 requests in one step, also where these are all rows; and one more than there are."""
    folder = save_random(
        tmp_path, vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    params = SamplingParams(temperature=0, max_tokens=2)
    prompts = [[i % 32, i // 32] for i in range(512)]
    with make_llm(folder, max_num_seqs=32) as llm:
        expected = tokens(llm, prompts, params)
    for limit in LIMITS:
        with make_llm(folder, max_num_seqs=limit, max_num_batched_tokens=2 * limit, max_model_len=16) as llm:
            for size in SIZES if limit == max(SIZES) else [limit]:
                num_steps = llm.get_metrics()["num_steps"]
                assert tokens(llm, prompts[:size], params) == expected[:size]
                assert llm.get_metrics()["num_steps"] == num_steps + 2, f"{size} requests must run as one batch"
            if limit in (1, 3, 64):
                assert tokens(llm, prompts[: limit + 1], params) == expected[: limit + 1]
