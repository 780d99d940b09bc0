"""deterministic=True: tokens and log-probabilities are equal to the bit, whatever else the engine does.

The same requests run alone, then in every way that changes what a step computes beside them.
"""

from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, RequestOutput, SamplingParams
from tests.tiny_models import random_prompts, save_random

PROMPTS = random_prompts([3, 40, 17, 30, 8, 21, 9, 16, 12, 33])
PROMPTS[6] = PROMPTS[1][:24]
PROMPTS[7] = PROMPTS[1][:32] + PROMPTS[7]
PARAMS = [
    SamplingParams(
        temperature=[0.0, 1.0, 1.5][i % 3],
        seed=i,
        top_p=[1.0, 0.9][i % 2],
        repetition_penalty=[1.0, 1.3][i % 4 == 3],
        max_tokens=10,
        logprobs=4,
        prompt_logprobs=[None, 2, 0][i % 3],
    )
    for i in range(len(PROMPTS))
]
MODELS = {
    "Qwen3ForCausalLM": {"num_key_value_heads": 1, "hidden_size": 72},
    "MistralForCausalLM": {"sliding_window": 11, "intermediate_size": 100},
    "Qwen3MoeForCausalLM": {"moe_intermediate_size": 20, "norm_topk_prob": True},
    "Qwen2MoeForCausalLM": {"num_experts": 5},
}
WAYS: list[dict[str, Any]] = [
    {},
    {"overlap_depth": 2, "max_num_batched_tokens": 11},
    {"overlap_depth": 2, "num_gpu_blocks_override": 9},
    {"enable_prefix_caching": False, "max_num_seqs": 3},
    {"speculative_config": {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 1, "adaptive": False}},
]


def make_llm(folder: Path, dtype: str, **options: Any) -> LLM:
    defaults = {"device": "cpu", "skip_tokenizer_init": True, "block_size": 8, "max_num_seqs": 8, "deterministic": True}
    return LLM(str(folder), dtype=dtype, **{**defaults, **options})


def numbers(outputs: list[RequestOutput]) -> list[Any]:
    """All that must be equal: every bit of every log-probability, and each rank."""

    assert all(output.deterministic for output in outputs)
    return [(output.outputs[0].token_ids, output.outputs[0].logprobs, output.prompt_logprobs) for output in outputs]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", MODELS)
def test_every_bit_is_the_same_whatever_else_runs(tmp_path: Path, architecture: str, dtype: str) -> None:
    """Batch, row, order, chunks, preemption, prefix hit, overlap."""
    folder = save_random(tmp_path, architecture, **MODELS[architecture])
    with make_llm(folder, dtype, enable_prefix_caching=False) as llm:
        alone = [
            numbers(llm.generate([prompt], params, use_tqdm=False))[0]
            for prompt, params in zip(PROMPTS, PARAMS, strict=True)
        ]
    for way in WAYS:
        with make_llm(folder, dtype, **way) as llm:
            assert numbers(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == alone
            assert numbers(llm.generate(PROMPTS[::-1], PARAMS[::-1], use_tqdm=False)) == alone[::-1]
            assert numbers(llm.generate([PROMPTS[4]] * 20, PARAMS[4], use_tqdm=False)) == [alone[4]] * 20
            metrics = llm.get_metrics()
        assert (metrics["num_preemptions"] > 0) == ("num_gpu_blocks_override" in way)
        assert (metrics["num_prompt_tokens_cached"] > 0) == way.get("enable_prefix_caching", True)


def test_it_computes_the_same_model(tmp_path: Path) -> None:
    """Beside the plain engine: the same tokens, and the same log-probabilities but for their last bits."""
    folder = save_random(tmp_path, "Qwen3ForCausalLM")
    params = SamplingParams(temperature=0, max_tokens=10, logprobs=1, prompt_logprobs=0)
    results = []
    for deterministic in (True, False):
        with make_llm(folder, "float32", deterministic=deterministic) as llm:
            results.append(llm.generate(PROMPTS, params, use_tqdm=False))
    for one, other in zip(*results, strict=True):
        assert (one.deterministic, other.deterministic) == (True, False)
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].cumulative_logprob == pytest.approx(other.outputs[0].cumulative_logprob, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"compilation": "inductor"}, "compilation"),
        ({"compilation": "none"}, "compilation"),
        ({"deterministic": 1}, ""),
    ],
)
def test_what_it_cannot_promise_is_refused(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"deterministic.*{named}"):
        make_llm(tmp_path, "float32", **options)


@pytest.mark.parametrize(
    ("architecture", "config", "named"),
    [
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("Gemma2ForCausalLM", {}, "soft-cap"),
    ],
)
def test_models_that_it_does_not_cover_are_refused(
    tmp_path: Path, architecture: str, config: dict[str, Any], named: str
) -> None:
    folder = save_random(tmp_path, architecture, **config)
    with pytest.raises(ValueError, match=f"deterministic.*{named}"):
        make_llm(folder, "float32")
