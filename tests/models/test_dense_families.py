"""Dense families beside the Llama-like ones: logits and greedy tokens beside Hugging Face, in every way of running.

Each case is one tiny random checkpoint in which the family's switches matter; windows are shorter than the prompts.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.models.parity import check_every_way_of_running, prompts_that_share
from tests.tiny_models import save_random

YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo3": (
        "Olmo3ForCausalLM",
        {
            **{"sliding_window": 6, "num_hidden_layers": 4, "num_key_value_heads": 4},
            "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}},
        },
    ),
    "exaone4": ("Exaone4ForCausalLM", {"sliding_window": 6, "num_hidden_layers": 4}),
    "exaone4-no-window": ("Exaone4ForCausalLM", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "glm": ("GlmForCausalLM", {"head_dim": 24, "partial_rotary_factor": 0.5}),
    "glm4": ("Glm4ForCausalLM", {"head_dim": 16, "attention_bias": False}),
    "ernie": ("Ernie4_5ForCausalLM", {"head_dim": 16}),
    "ernie-bias": ("Ernie4_5ForCausalLM", {"head_dim": 24, "use_bias": True, "tie_word_embeddings": False}),
    "arcee-bias": ("ArceeForCausalLM", {"mlp_bias": True, "head_dim": 24}),
    "hunyuan": (
        "HunYuanDenseV1ForCausalLM",
        {"head_dim": 16, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "alpha": 9.0, "factor": 1.0}},
    ),
    "hunyuan-yarn": (
        "HunYuanDenseV1ForCausalLM",
        {"head_dim": 16, "rope_parameters": {**YARN, "attention_factor": 2.0}},
    ),
    "starcoder2": ("Starcoder2ForCausalLM", {"norm_epsilon": 0.1}),
    "starcoder2-window": (
        "Starcoder2ForCausalLM",
        {"sliding_window": 44, "use_bias": False, "tie_word_embeddings": False},
    ),
    "cohere": ("CohereForCausalLM", {"logit_scale": 0.5, "layer_norm_eps": 0.1}),
    "cohere2": ("Cohere2ForCausalLM", {"sliding_window": 6, "num_hidden_layers": 4, "attention_bias": True}),
    "apertus": ("ApertusForCausalLM", {}),
    "ministral3": (
        "Ministral3ForCausalLM",
        {
            **{"head_dim": 24, "num_key_value_heads": 1},
            "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.7, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_way_of_running_equals_hugging_face(tmp_path: Path, case: str) -> None:
    architecture, config = CASES[case]
    folder = save_random(tmp_path, architecture, **config)
    prompts = prompts_that_share(40, 32)
    check_every_way_of_running(folder, prompts, max_num_batched_tokens=64, num_blocks=8, num_cached=1)
