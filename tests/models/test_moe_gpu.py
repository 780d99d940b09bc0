"""Mixtures of experts on a GPU: the grouped kernel in every way of running gives the tokens of the CPU's reference."""

import threading
from pathlib import Path
from typing import Any

import pytest

from nanovllm import SamplingParams
from tests.gpu_engine import make_llm, tokens
from tests.tiny_models import random_prompts, save_random

pytestmark = pytest.mark.gpu

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        {"num_experts": 24, "num_experts_per_tok": 4, "moe_intermediate_size": 48, "norm_topk_prob": True},
    ),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "intermediate_size": 80, "sliding_window": 48}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {"num_experts": 24, "num_experts_per_tok": 4, "moe_intermediate_size": 48}),
    "glm4-moe-groups": (
        "Glm4MoeForCausalLM",
        {
            **{"n_routed_experts": 24, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 5, "head_dim": 64},
            **{"use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 2.5},
        },
    ),
    "ernie-moe": ("Ernie4_5_MoeForCausalLM", {"moe_num_experts": 24, "moe_k": 5, "head_dim": 64}),
    # Latent attention: sizes that are no powers of two, more heads than a program takes, groups of experts.
    "deepseek-v2": (
        "DeepseekV2ForCausalLM",
        {
            **{
                "kv_lora_rank": 96,
                "q_lora_rank": None,
                "qk_rope_head_dim": 16,
                "qk_nope_head_dim": 24,
                "v_head_dim": 40,
            },
            **{"n_routed_experts": 24, "num_experts_per_tok": 5, "topk_method": "group_limited_greedy", "n_group": 4},
            **{"topk_group": 2, "num_key_value_heads": 4, "first_k_dense_replace": 1},
        },
    ),
    "kimi-linear": (
        "KimiLinearForCausalLM",
        {
            **{"kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 40, "num_experts": 24},
            **{"num_experts_per_token": 5, "num_key_value_heads": 4, "linear_head_dim": 48, "linear_num_heads": 4},
            **{"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        },
    ),
    "glm-4.7-flash": (
        "Glm4MoeLiteForCausalLM",
        {
            **{"kv_lora_rank": 64, "q_lora_rank": 48, "qk_rope_head_dim": 32, "qk_nope_head_dim": 48, "v_head_dim": 64},
            **{"n_routed_experts": 24, "num_attention_heads": 20, "num_key_value_heads": 20, "hidden_size": 320},
        },
    ),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 10, "num_experts_per_tok": 3, "num_key_value_heads": 4}),
}
SIZES = {"hidden_size": 256, "max_position_embeddings": 512}
WAYS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "chunks": {"max_num_batched_tokens": 48},
    "preempting": {"num_gpu_blocks_override": 10},
    "three rows": {"max_num_seqs": 3},
    "plain layers": {"compilation": "none"},
}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_prompts([1, 3, 63, 64, 65, 130, 17, 200, 64, 5, 90, 128])


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, config = CASES[request.param]
    return save_random(tmp_path_factory.mktemp(request.param), architecture, **{**SIZES, **config})


@pytest.fixture(scope="module")
def on_cpu(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    with make_llm(folder, device="cpu", compilation="none") as llm:
        return tokens(llm, prompts)


@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_equal_the_cpu(folder: Path, prompts: list[list[int]], on_cpu: list[list[int]], way: str) -> None:
    """Cold and with a warm prefix cache."""
    with make_llm(folder, **WAYS[way]) as llm:
        assert tokens(llm, prompts) == on_cpu
        assert tokens(llm, prompts) == on_cpu


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_repeatable(folder: Path, prompts: list[list[int]], dtype: str) -> None:
    """Nothing in the sums over experts depends on timing."""
    with make_llm(folder, dtype=dtype, enable_prefix_caching=False) as llm:
        assert tokens(llm, prompts) == tokens(llm, prompts)


def test_prompts_of_any_size_find_compiled_kernels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once the threads that compile behind an engine have ended. No other test has as many experts."""
    folder = save_random(tmp_path, "Qwen3MoeForCausalLM", **SIZES, num_experts=21, num_experts_per_tok=3)
    with make_llm(folder) as llm:
        for thread in threading.enumerate():
            if thread.name == "nanovllm-compile":
                thread.join()
        with caplog.at_level("INFO", logger="nanovllm.late"):
            for num_tokens in (20, 50, 90, 120, 180, 250):
                tokens(llm, random_prompts([num_tokens]), SamplingParams(max_tokens=1))
    late = [record.getMessage() for record in caplog.records if "compiled late" in record.getMessage()]
    assert not [message for message in late if "_align" in message or "_grouped" in message]
