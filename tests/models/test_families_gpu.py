"""Every dense family on a GPU: its kernels, in graphs and without, give the tokens of the CPU's references."""

from pathlib import Path
from typing import Any

import pytest

from tests.gpu_engine import make_llm, tokens
from tests.tiny_models import random_prompts, save_random

pytestmark = pytest.mark.gpu

# Head dimensions from 64 to 256, windows shorter than the prompts, every switch of the decoder.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-d96-bias": ("LlamaForCausalLM", {"head_dim": 96, "attention_bias": True, "mlp_bias": True}),
    "mistral-d80-window": ("MistralForCausalLM", {"head_dim": 80, "sliding_window": 48}),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
    ),
    "qwen3-d128": ("Qwen3ForCausalLM", {"head_dim": 128}),
    "smollm3": ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}),
    "gemma2-d256": (
        "Gemma2ForCausalLM",
        {
            **{"head_dim": 256, "sliding_window": 48, "query_pre_attn_scalar": 30},
            **{"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
        },
    ),
    "gemma3-d256": (
        "Gemma3ForCausalLM",
        {"num_hidden_layers": 3, "sliding_window_pattern": 2, "sliding_window": 40, "head_dim": 256},
    ),
    "gemma4-d512": (
        "Gemma4ForCausalLM",
        {
            **{"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
            **{"num_kv_shared_layers": 2, "sliding_window": 40, "head_dim": 256, "global_head_dim": 512},
        },
    ),
    "gpt-oss-d64": ("GptOssForCausalLM", {"head_dim": 64, "sliding_window": 40}),
    "phi3-window": ("Phi3ForCausalLM", {"sliding_window": 48}),
    "phi4-partial": (
        "Phi3ForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.75}},
    ),
    "phi4-longrope": (
        "Phi3ForCausalLM",
        {
            "original_max_position_embeddings": 96,
            "rope_parameters": {
                **{"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
                **{"short_factor": [1.0 + 0.1 * i for i in range(16)], "long_factor": [2.0 + i for i in range(16)]},
                "original_max_position_embeddings": 96,
            },
        },
    ),
    "olmo2": ("Olmo2ForCausalLM", {}),
    # Rows in another order, norms after the rotation, LayerNorm before products that take an RMS norm in, no gate.
    "glm4-d64": ("Glm4ForCausalLM", {"head_dim": 64}),
    "hunyuan-d64": ("HunYuanDenseV1ForCausalLM", {"head_dim": 64}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "cohere2-window": ("Cohere2ForCausalLM", {"sliding_window": 40, "num_hidden_layers": 4, "logit_scale": 1.0}),
    "apertus": ("ApertusForCausalLM", {}),
    "ministral3-d64": (
        "Ministral3ForCausalLM",
        {
            "head_dim": 64,
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 5000.0, "factor": 8.0, "original_max_position_embeddings": 64},
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
    "granite": (
        "GraniteForCausalLM",
        {
            **{"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 5.0},
            "attention_multiplier": 0.1,
        },
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        {
            **{"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "conv_bias": True},
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "qwen3.5-d64": (
        "Qwen3_5ForCausalLM",
        {
            **{"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "head_dim": 64},
            "linear_value_head_dim": 48,
        },
    ),
    "granite4-moe": (
        "GraniteMoeHybridForCausalLM",
        {
            **{"num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"], "residual_multiplier": 0.5},
            **{"mamba_n_heads": 8, "mamba_d_state": 48, "num_local_experts": 8, "intermediate_size": 48},
        },
    ),
    "nemotron-h": (
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"],
            **{"mamba_num_heads": 6, "mamba_head_dim": 80, "ssm_state_size": 32, "n_groups": 3, "head_dim": 64},
        },
    ),
    "nemotron-3": (
        "NemotronHForCausalLM",
        {
            **{"layers_block_type": ["linear_attention", "moe", "full_attention"], "head_dim": 64},
            **{"n_routed_experts": 8, "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 40},
        },
    ),
}
SIZES = {"hidden_size": 256, "max_position_embeddings": 512}  # heads of 64 where the family has no head_dim
WAYS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "chunks": {"max_num_batched_tokens": 48},
    "preempting": {"num_gpu_blocks_override": 10},
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
def test_half_precision_runs_the_small_kernels(folder: Path, dtype: str) -> None:
    """Fused norm, product and gate at 1 to 8 rows: the same tokens as plain layers, but for near ties."""
    prompts = random_prompts([20] * 8, seed=3)
    equal = 0
    with make_llm(folder, dtype=dtype) as fused, make_llm(folder, dtype=dtype, compilation="none") as plain:
        for count in (1, 2, 4, 8):
            pairs = zip(tokens(fused, prompts[:count]), tokens(plain, prompts[:count]), strict=True)
            equal += sum(a[:8] == b[:8] for a, b in pairs)
    assert equal >= 10  # of 15
