"""The demo model in float32 beside Hugging Face: greedy tokens of 32 prompts of mixed length, in every way of running.

Hugging Face reads the same GGUF file by its own code, so nothing of this package is between its weights and its tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.model_files.demo_model import ensure_demo_model

pytestmark = [pytest.mark.demo_model, pytest.mark.slow]

NUM_OUTPUT = 16
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT, ignore_eos=True)
LENGTHS = [5, 6, 7, 8, 9, 12, 15, 16, 17, 20, 24, 31, 32, 33, 40, 48]
LENGTHS += [55, 63, 64, 65, 80, 97, 120, 127, 128, 150, 200, 256, 333, 450, 640, 900]
TOPICS = [
    "Continuous batching admits a new request as soon as another one ends.",
    "The river rises in the hills, turns east below the old mill, and meets the sea at a town of fishermen.",
    "def add(a, b):\n    return a + b\n",
    "Question: what is the capital of France? Answer: Paris.",
    "1, 2, 3, 5, 8, 13, 21, 34, 55, 89",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
]


def make_llm(path: Path, **options: Any) -> LLM:
    return LLM(str(path), **{"device": "cpu", "dtype": "float32", "max_model_len": 1024, "block_size": 16, **options})


@dataclass
class Reference:
    """What Hugging Face says. greedy: by prompt, tokens that were found to be those of its greedy search."""

    path: Path
    prompts: list[list[int]]
    model: Any
    greedy: dict[int, list[int]] = field(default_factory=dict)

    def check(self, outputs: dict[int, list[int]], way: str) -> None:
        """Outputs by prompt: all equal. Else the message says how near the candidates were where they first differ."""
        differences = []
        for i, ours in outputs.items():
            prompt = self.prompts[i]
            if self.greedy.get(i) == ours:
                continue
            logits = self._logits(prompt, ours)
            theirs = logits.argmax(-1).tolist()
            if i not in self.greedy and theirs == ours:  # each is the likeliest after those before it
                self.greedy[i] = ours
                continue
            theirs = self.greedy.get(i, theirs)
            at = next(k for k in range(NUM_OUTPUT) if ours[k] != theirs[k])
            gap = (logits[at, theirs[at]] - logits[at, ours[at]]).item()
            differences.append(
                f"prompt {i} ({len(prompt)} tokens), output token {at}: ours {ours[at]}, "
                f"theirs {theirs[at]}, {gap:.2e} apart in their logits"
            )
        assert not differences, f"{way}: " + "; ".join(differences)

    @torch.no_grad()
    def _logits(self, prompt: list[int], output: list[int]) -> Tensor:
        """[NUM_OUTPUT, vocab_size], before each token of the output."""
        return self.model(torch.tensor([[*prompt, *output[:-1]]]), logits_to_keep=NUM_OUTPUT).logits[0]


@pytest.fixture(scope="module")
def reference() -> Iterator[Reference]:
    from transformers import AutoModelForCausalLM

    path = ensure_demo_model(progress=False)
    with make_llm(path, num_gpu_blocks_override=1) as llm:
        tokenizer = llm.get_tokenizer()
    prompts = []
    for i, length in enumerate(LENGTHS):
        text = " ".join(TOPICS[(i + k) % len(TOPICS)] for k in range(length // 8 + 3))
        prompts.append(tokenizer.encode(text)[:length])
    assert [len(prompt) for prompt in prompts] == LENGTHS
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    yield Reference(path, prompts, model)


def tokens(llm: LLM, prompts: list[list[int]]) -> dict[int, list[int]]:
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    return {i: output.outputs[0].token_ids for i, output in enumerate(outputs)}


def test_one_batch_cold_and_with_a_warm_prefix_cache(reference: Reference) -> None:
    """All 32 in one step, then all over again from cached blocks."""
    with make_llm(reference.path, max_num_seqs=32, max_num_batched_tokens=sum(LENGTHS)) as llm:
        reference.check(tokens(llm, reference.prompts), "one batch")
        assert llm.get_metrics()["num_steps"] == NUM_OUTPUT
        reference.check(tokens(llm, reference.prompts), "warm prefix cache")
        num_cached = llm.get_metrics()["num_prompt_tokens_cached"]
    assert num_cached >= sum((length - 1) // 16 * 16 for length in LENGTHS)


def test_small_chunks(reference: Reference) -> None:
    with make_llm(
        reference.path, max_num_seqs=16, max_num_batched_tokens=100, enable_prefix_caching=False, overlap_depth=2
    ) as llm:
        reference.check(tokens(llm, reference.prompts), "chunks of 100 tokens")
        assert llm.get_metrics()["num_steps"] > sum(LENGTHS) // 100


def test_a_cache_so_small_that_it_preempts(reference: Reference) -> None:
    num_blocks = -(-(max(LENGTHS) + NUM_OUTPUT) // 16)
    with make_llm(reference.path, max_num_seqs=32, num_gpu_blocks_override=num_blocks) as llm:
        reference.check(tokens(llm, reference.prompts), "preempting")
        assert llm.get_metrics()["num_preemptions"] > 0


def test_greedy_beside_seeded_requests_that_come_out_the_same_again(reference: Reference) -> None:
    """On a real model. (Alone, the last bits of logits differ, so a draw may differ from one in a batch.)"""
    prompts = reference.prompts[:8]
    params = [SamplingParams(seed=i, max_tokens=NUM_OUTPUT, top_p=0.9, ignore_eos=True) for i in range(8)]
    params[3] = params[6] = GREEDY
    results = []
    with make_llm(reference.path, max_num_seqs=8) as llm:
        for _ in range(2):
            llm.reset_prefix_cache()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            results.append([output.outputs[0].token_ids for output in outputs])
    assert results[0] == results[1]
    reference.check({i: results[0][i] for i in (3, 6)}, "greedy beside seeded")
