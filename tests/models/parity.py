"""An engine beside Hugging Face: the checks that every family's checkpoints go through."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.kernels.cpu.cpu_kernels import load_cpu_kernels
from tests.llm_checks import check_nothing_is_left
from tests.runner.fake_graphs import fake_graphs
from tests.tiny_models import (
    hugging_face_greedy,
    hugging_face_logits,
    load_hugging_face,
    random_prompts,
    record_logits,
)

NUM_OUTPUT = 12
ONE = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT)


def make_llm(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), **{"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, **options})


def check_logits(folder: Path, hugging_face: Any, max_num_batched_tokens: int) -> None:
    """Every position, prompt and output, at most 1e-4 apart in float32; and the same greedy tokens."""
    prompt = random_prompts([41])[0]
    with make_llm(folder, max_num_seqs=1, max_num_batched_tokens=max_num_batched_tokens) as llm:
        logits = record_logits(llm)
        (output,) = llm.generate([prompt], ONE, use_tqdm=False)
    token_ids = prompt + output.outputs[0].token_ids
    torch.testing.assert_close(logits(), hugging_face_logits(hugging_face, token_ids[:-1]), atol=1e-4, rtol=0)
    assert output.outputs[0].token_ids == hugging_face_greedy(hugging_face, prompt, NUM_OUTPUT)


@torch.no_grad()
def check_greedy_outputs(hugging_face: Any, prompts: list[list[int]], outputs: list[list[int]]) -> None:
    """Each token is the one that Hugging Face finds likeliest after those before it: what its greedy search gives."""
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = hugging_face_logits(hugging_face, [*prompt, *output[:-1]])
        assert logits[len(prompt) - 1 :].argmax(-1).tolist() == output


def check_greedy_tokens(
    folder: Path, prompts: list[list[int]], expected: list[list[int]], *, preempts: bool, **options: Any
) -> None:
    """Cold and from a warm prefix cache. preempts: requests must be preempted with these options; else none may be."""
    options = {"max_num_seqs": 6, "max_num_batched_tokens": 64, "block_size": 16, **options}
    with make_llm(folder, **options) as llm:
        for _ in ("cold", "warm"):
            outputs = llm.generate(prompts, ONE, use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == expected
        metrics = llm.get_metrics()
    assert (metrics["num_preemptions"] > 0) == preempts
    if options.get("enable_prefix_caching", True):
        assert metrics["num_prompt_tokens_cached"] > 0


def prompts_that_share(first_len: int = 70, num_shared: int = 48) -> list[list[int]]:
    """The last shares whole blocks with the first."""
    prompts = random_prompts([first_len, 1, 17])
    return [*prompts, prompts[0][:num_shared] + prompts[2]]


def check_every_way_of_running(
    folder: Path, prompts: list[list[int]], *, max_num_batched_tokens: int, num_blocks: int, num_cached: int
) -> None:
    """Greedy tokens as a batch, from a warm prefix cache, in chunks, and preempted; logits of prompt and output.

    num_blocks: of 8 tokens, too few for all prompts at once. num_cached: least tokens that the warm cache must give.
    """
    hugging_face = load_hugging_face(folder)
    with make_llm(folder, max_num_seqs=4, max_num_batched_tokens=max_num_batched_tokens, block_size=16) as llm:
        outputs = [output.outputs[0].token_ids for output in llm.generate(prompts, ONE, use_tqdm=False)]
        check_greedy_outputs(hugging_face, prompts, outputs)
        cached = llm.get_metrics()["num_prompt_tokens_cached"]
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, ONE, use_tqdm=False)] == outputs
        assert llm.get_metrics()["num_prompt_tokens_cached"] >= cached + num_cached
        check_nothing_is_left(llm)
    options = {"num_gpu_blocks_override": num_blocks, "block_size": 8, "overlap_depth": 2}
    with make_llm(folder, max_num_seqs=4, max_num_batched_tokens=19, enable_prefix_caching=False, **options) as llm:
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, ONE, use_tqdm=False)] == outputs
        assert llm.get_metrics()["num_preemptions"] > 0
        logits = record_logits(llm)
        llm.generate(prompts[:1], ONE, use_tqdm=False)
    expected = hugging_face_logits(hugging_face, prompts[0] + outputs[0][:-1])
    torch.testing.assert_close(logits(), expected, atol=1e-4, rtol=0)


def greedy_tokens(folder: Path, **options: Any) -> list[list[int]]:
    with make_llm(folder, **options) as llm:
        outputs = llm.generate(random_prompts([30, 3]), ONE, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def check_captured_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = greedy_tokens(folder)
    fake = fake_graphs(monkeypatch)
    assert greedy_tokens(folder, overlap_depth=2) == expected and fake.replayed


def check_deterministic_bits(folder: Path, prompt_len: int, num_before: int) -> None:
    """On a hit, in chunks and beside others they are those of a miss. num_before: tokens of the prompt that the cache
    has read before the hit.
    """
    if load_cpu_kernels() is None:
        pytest.skip("needs a C++ compiler")
    prompt, other = random_prompts([prompt_len, 33])

    def logprobs(num_batched_tokens: int, before: list[list[int]], beside: list[list[int]]) -> list[Any]:
        options = {"block_size": 8, "max_num_batched_tokens": num_batched_tokens, "deterministic": True}
        with make_llm(folder, max_num_seqs=4, **options) as llm:
            llm.generate(before, ONE, use_tqdm=False)
            output = llm.generate([prompt, *beside], replace(ONE, logprobs=5), use_tqdm=False)[0]
        assert bool(output.num_cached_tokens) == bool(before)
        return [{i: entry.logprob for i, entry in entries.items()} for entries in output.outputs[0].logprobs]

    miss = logprobs(128, [], [])
    assert logprobs(128, [prompt[:num_before]], []) == miss
    assert logprobs(19, [], [other]) == miss
