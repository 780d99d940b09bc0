"""What a request asks of the sampler, on a GPU: tokens and numbers of the CPU, and every bit if asked. Run: -m gpu"""

from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, RequestOutput, SamplingParams
from tests.test_llm_deterministic import PARAMS, PROMPTS
from tests.test_llm_sampling import REQUESTS
from tests.tiny_models import VOCAB_WITH_TOKENIZER, random_prompts, save_random

pytestmark = pytest.mark.gpu

WAYS: list[dict[str, Any]] = [
    {},
    {"overlap_depth": 1, "max_num_batched_tokens": 16},
    {"enforce_eager": True},
    {"num_gpu_blocks_override": 9, "block_size": 8},
]


def make_llm(folder: Path, **options: Any) -> LLM:
    defaults = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 256, "max_num_seqs": 8}
    return LLM(str(folder), **{**defaults, "num_gpu_blocks_override": 100, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return save_random(path, "Qwen3ForCausalLM", vocab_size=VOCAB_WITH_TOKENIZER, head_dim=64)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_stage_gives_the_tokens_of_the_cpu(folder: Path, way: dict[str, Any]) -> None:
    """C8, W12: penalties, bias, allowed tokens, min_tokens and Python processors beside plain rows in their graph."""
    prompts = random_prompts([3, 17, 30, 8, 21, 9, 16, 12, 33], vocab_size=VOCAB_WITH_TOKENIZER)
    with make_llm(folder, device="cpu", compilation="none") as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, REQUESTS, use_tqdm=False)]
    with make_llm(folder, **way) as llm:
        for _ in range(2):
            outputs = llm.generate(prompts, REQUESTS, use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == expected


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_logprobs_are_those_of_the_cpu(folder: Path, way: dict[str, Any]) -> None:
    """W15"""
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3, prompt_logprobs=2)
    with make_llm(folder, device="cpu", compilation="none") as llm:
        expected = llm.generate(PROMPTS, params, use_tqdm=False)
    with make_llm(folder, **way) as llm:
        for _ in range(2):
            for got, want in zip(llm.generate(PROMPTS, params, use_tqdm=False), expected, strict=True):
                assert got.outputs[0].token_ids == want.outputs[0].token_ids
                assert got.outputs[0].cumulative_logprob == pytest.approx(want.outputs[0].cumulative_logprob, abs=1e-3)
                assert got.prompt_logprobs is not None and want.prompt_logprobs is not None
                for token, one, other in zip(
                    got.prompt_token_ids[1:], got.prompt_logprobs[1:], want.prompt_logprobs[1:], strict=True
                ):
                    assert one is not None and other is not None
                    assert one[token].logprob == pytest.approx(other[token].logprob, abs=1e-3)


def numbers(outputs: list[RequestOutput]) -> list[Any]:
    return [(output.outputs[0].token_ids, output.outputs[0].logprobs, output.prompt_logprobs) for output in outputs]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_bit_is_the_same_whatever_else_runs(folder: Path, dtype: str) -> None:
    """W12, W15, with deterministic=True: batch, row, order, chunks, preemption, prefix hit, graphs, overlap."""
    options = {"dtype": dtype, "deterministic": True}
    with make_llm(folder, **options, enable_prefix_caching=False) as llm:
        alone = [
            numbers(llm.generate([prompt], params, use_tqdm=False))[0]
            for prompt, params in zip(PROMPTS, PARAMS, strict=True)
        ]
    for way in WAYS:
        with make_llm(folder, **options, **way) as llm:
            assert numbers(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == alone
            assert numbers(llm.generate(PROMPTS[::-1], PARAMS[::-1], use_tqdm=False)) == alone[::-1]
            assert numbers(llm.generate([PROMPTS[4]] * 20, PARAMS[4], use_tqdm=False)) == [alone[4]] * 20
