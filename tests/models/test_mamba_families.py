"""Families with Mamba-2 layers beside Hugging Face: logits and greedy tokens, in every way of running.

Each case is one tiny random checkpoint in which the family's switches matter.
"""

from pathlib import Path
from typing import Any

import pytest

from nanovllm.cache_specs import StateShape
from nanovllm.models.registry import read_model_config
from tests.models.parity import check_every_way_of_running, prompts_that_share
from tests.tiny_models import save_random

MULTIPLIERS = {
    **{"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 5.0},
}
GRANITE: dict[str, Any] = {
    **{"num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 56},
    **{"mamba_n_heads": 8, "mamba_d_state": 12, "rms_norm_eps": 0.01, "num_local_experts": 0, **MULTIPLIERS},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "granite4": ("GraniteMoeHybridForCausalLM", {**GRANITE, "position_embedding_type": None}),
    "granite4-moe": (
        "GraniteMoeHybridForCausalLM",
        {
            **{**GRANITE, "num_local_experts": 8, "intermediate_size": 24, "mamba_n_groups": 2},
            **{"mamba_conv_bias": False, "mamba_proj_bias": True, "mamba_d_conv": 3, "position_embedding_type": "rope"},
        },
    ),
    "granite4-dense": (
        "GraniteMoeHybridForCausalLM",
        {
            **{**GRANITE, "layer_types": ["attention"] * 2, "num_hidden_layers": 2, "num_experts_per_tok": 0},
            **{"attention_bias": True, "tie_word_embeddings": True, "position_embedding_type": "rope"},
        },
    ),
    "nemotron-h": (
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"],
            **{"mamba_num_heads": 6, "n_groups": 3, "layer_norm_epsilon": 0.01},
        },
    ),
    "nemotron-3": (
        "NemotronHForCausalLM",
        {
            **{"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "n_routed_experts": 8},
            **{"moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 20, "routed_scaling_factor": 2.5},
            **{"n_group": 2, "topk_group": 1},
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_way_of_running_equals_hugging_face(tmp_path: Path, case: str) -> None:
    architecture, config = CASES[case]
    folder = save_random(tmp_path, architecture, **config)
    prompts = prompts_that_share()
    check_every_way_of_running(folder, prompts, max_num_batched_tokens=128, num_blocks=12, num_cached=64 + 16 + 48)


NEMOTRON_NANO_2: dict[str, Any] = {
    **{"architectures": ["NemotronHForCausalLM"], "attention_bias": False, "chunk_size": 128, "conv_kernel": 4},
    **{"expand": 2, "head_dim": 128, "hidden_dropout": 0.0, "hidden_size": 4480, "intermediate_size": 15680},
    **{"layer_norm_epsilon": 1e-5, "mamba_head_dim": 80, "mamba_hidden_act": "silu", "mamba_num_heads": 128},
    **{"max_position_embeddings": 131072, "mlp_bias": False, "mlp_hidden_act": "relu2", "n_groups": 8},
    **{"num_attention_heads": 40, "num_hidden_layers": 9, "num_key_value_heads": 8, "num_query_groups": 8},
    **{"residual_in_fp32": False, "ssm_state_size": 128, "tie_word_embeddings": False, "time_step_floor": 0.0001},
    **{"time_step_limit": [0.0, float("inf")], "use_bias": False, "use_conv_bias": True, "vocab_size": 131072},
    "hybrid_override_pattern": "M-MM*-M-M",
}
GRANITE_4_TINY: dict[str, Any] = {
    **{"architectures": ["GraniteMoeHybridForCausalLM"], "hidden_size": 1536, "intermediate_size": 512},
    **{"layer_types": ["mamba", "mamba", "attention"], "logits_scaling": 6, "mamba_chunk_size": 256},
    **{"mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2},
    **{"mamba_n_groups": 1, "mamba_n_heads": 48, "mamba_proj_bias": False, "max_position_embeddings": 131072},
    **{"normalization_function": "rmsnorm", "num_attention_heads": 12, "num_experts_per_tok": 6},
    **{"num_hidden_layers": 3, "num_key_value_heads": 4, "num_local_experts": 64, "position_embedding_type": "nope"},
    **{"rope_theta": 10000, "shared_intermediate_size": 1024, "vocab_size": 100352, "init_method": "mup"},
}


def test_configs_of_released_models() -> None:
    nemotron = read_model_config(NEMOTRON_NANO_2, "bfloat16")
    assert nemotron.windows == (0, 0, 0, None, 0, 0) and set(nemotron.ropes) == {None}
    assert nemotron.state == StateShape(128 * 80 + 2 * 8 * 128, 4, 128, 128, 80) and nemotron.state.num_key_heads == 8
    assert (nemotron.activation, nemotron.rms_norm_eps, nemotron.num_layers) == ("relu2", 1e-5, 6)
    granite = read_model_config(GRANITE_4_TINY, "bfloat16")
    assert granite.windows == (0, 0, None) and set(granite.ropes) == {None} and granite.intermediate_size == 512
    assert granite.state == StateShape(48 * 64 + 2 * 128, 4, 48, 128, 64)
    assert granite.state.part(2) == StateShape(24 * 64 + 2 * 128, 4, 24, 128, 64)  # b and c are on both ranks


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (GRANITE_4_TINY, "mamba_d_head", 7),
        (GRANITE_4_TINY, "mamba_n_groups", 5),
        (GRANITE_4_TINY, "time_step_limit", [0.0, 0.1]),
        (NEMOTRON_NANO_2, "hybrid_override_pattern", "M-M?"),
        (NEMOTRON_NANO_2, "mamba_hidden_act", "gelu"),
        (NEMOTRON_NANO_2, "mlp_hidden_act", "gelu"),
        (NEMOTRON_NANO_2, "ssm_state_size", 512),
    ],
)
def test_what_would_be_run_wrongly_is_refused_by_name(config: dict[str, Any], name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name.replace("mlp_hidden_act", "hidden_act")):
        read_model_config({**config, name: value}, "bfloat16")


@pytest.mark.parametrize("pattern", ["-M*", "M--*"])
def test_an_mlp_without_a_mixer_is_refused(pattern: str) -> None:
    with pytest.raises(NotImplementedError, match="is an MLP that no Mamba or attention layer stands before"):
        read_model_config({**NEMOTRON_NANO_2, "hybrid_override_pattern": pattern}, "bfloat16")
