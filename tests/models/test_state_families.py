"""Families with states beside Hugging Face: logits and greedy tokens, in every way of running.

Each case is one tiny random checkpoint in which the family's switches matter.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.models.parity import ONE, check_deterministic_bits, check_every_way_of_running, make_llm, prompts_that_share
from tests.models.test_mamba_families import CASES as MAMBA
from tests.runner.fake_graphs import fake_graphs
from tests.test_llm_speculation import Adversary, drafting
from tests.tiny_models import random_prompts, save_random

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": (
        "Lfm2ForCausalLM",
        {
            **{"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
            **{"intermediate_size": 60, "block_multiple_of": 8, "norm_eps": 0.01},
        },
    ),
    "lfm2-bias": (
        "Lfm2ForCausalLM",
        {
            **{"full_attn_idxs": [1], "conv_bias": True, "conv_L_cache": 5, "block_auto_adjust_ff_dim": False},
            **{"num_hidden_layers": 3, "tie_word_embeddings": False},
        },
    ),
    "lfm2-moe": (
        "Lfm2MoeForCausalLM",
        {
            **{"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
            **{"routed_scaling_factor": 1.5},
        },
    ),
}

DELTA_NET = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12},
    **{"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    **{"head_dim": 16, "rms_norm_eps": 0.01},
    "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
}
CASES |= {
    "qwen3.5": ("Qwen3_5ForCausalLM", {**DELTA_NET, "attention_bias": True}),
    "qwen3.5-moe": ("Qwen3_5MoeForCausalLM", DELTA_NET),
    "qwen3-next": ("Qwen3NextForCausalLM", {**DELTA_NET, "mlp_only_layers": [0], "linear_conv_kernel_dim": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_way_of_running_equals_hugging_face(tmp_path: Path, case: str) -> None:
    architecture, config = CASES[case]
    folder = save_random(tmp_path, architecture, **config)
    prompts = prompts_that_share()
    check_every_way_of_running(folder, prompts, max_num_batched_tokens=128, num_blocks=12, num_cached=64 + 16 + 48)


@pytest.mark.parametrize("case", ["lfm2", "qwen3.5", "granite4"])
def test_deterministic_bits_are_those_of_a_miss(tmp_path: Path, case: str) -> None:
    architecture, config = (CASES | MAMBA)[case]
    folder = save_random(tmp_path, architecture, **config)
    check_deterministic_bits(folder, prompt_len=90, num_before=60)


def test_captured_steps_keep_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding keeps none, and snapshots are written in them, too: the second time begins from those."""
    architecture, config = CASES["lfm2"]
    folder = save_random(tmp_path, architecture, **config)
    prompts = random_prompts([70, 1, 17])
    params = replace(ONE, max_tokens=80)
    with make_llm(folder, max_num_seqs=5) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    second = [[*prompt, *output, 1, 2] for prompt, output in zip(prompts, expected, strict=True)]
    with make_llm(folder, max_num_seqs=5, enable_prefix_caching=False) as llm:
        answers = [output.outputs[0].token_ids for output in llm.generate(second, ONE, use_tqdm=False)]
    fake = fake_graphs(monkeypatch)
    with make_llm(folder, max_num_seqs=5, overlap_depth=2) as llm:
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)] == expected
        outputs = llm.generate(second, ONE, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == answers
        assert [output.num_cached_tokens for output in outputs] == [128, 64, 64]
    assert fake.num_decodes > 20 and fake.num_prompts > 0


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("case", ["lfm2", "qwen3.5", "granite4"])
def test_rejected_drafts_leave_no_state_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, captured: bool
) -> None:
    """Nor in a snapshot: the second time, prompts with their outputs begin from those that verifying steps kept."""
    architecture, config = (CASES | MAMBA)[case]
    folder = save_random(tmp_path, architecture, **config)
    prompts = random_prompts([30, 1, 17])
    params = [
        replace(ONE, max_tokens=80),
        replace(ONE, max_tokens=80, temperature=1.0, seed=1),
        replace(ONE, max_tokens=80, presence_penalty=0.5, logprobs=1),
    ]
    with make_llm(folder, max_num_seqs=5) as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
        second = [[*prompt, *o.outputs[0].token_ids, 1, 2] for prompt, o in zip(prompts, expected, strict=True)]
        llm.reset_prefix_cache()
        answers = [output.outputs[0].token_ids for output in llm.generate(second, ONE, use_tqdm=False)]
    if captured:
        fake_graphs(monkeypatch)
    with make_llm(folder, max_num_seqs=5, **drafting(Adversary("random", expected))) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]
        metrics = llm.get_metrics()
        outputs = llm.generate(second, ONE, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == answers
        assert [output.num_cached_tokens for output in outputs] == [64, 64, 64]
    assert 20 < metrics["spec_decode_num_accepted_tokens"] < metrics["spec_decode_num_draft_tokens"]
