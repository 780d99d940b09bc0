"""Families with latent attention beside Hugging Face: logits and greedy tokens, in every way of running.

Each case is one tiny random checkpoint in which the family's switches matter.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from nanovllm.attention.cpu_latent import CpuLatentBackend
from nanovllm.models.registry import read_model_config
from tests.lora.random_adapters import make_tensors, merged, request
from tests.models.parity import (
    ONE,
    check_deterministic_bits,
    check_every_way_of_running,
    check_greedy_outputs,
    make_llm,
    prompts_that_share,
)
from tests.runner.fake_graphs import fake_graphs
from tests.tiny_models import edit_json, load_hugging_face, save_random

SIZES: dict[str, Any] = {
    **{"kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 20, "num_key_value_heads": 4},
    **{"num_hidden_layers": 3, "rms_norm_eps": 0.01, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
# Stretched, so that the softmax's scale is, too, and by another factor than cosines and sines.
YARN = {
    **{"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 64},
    **{"mscale": 0.707, "mscale_all_dim": 0.9, "beta_fast": 32, "beta_slow": 1},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek-v2-lite": (
        "DeepseekV2ForCausalLM",
        {**SIZES, "q_lora_rank": None, "rope_parameters": YARN, "first_k_dense_replace": 1},
    ),
    "deepseek-v2": (
        "DeepseekV2ForCausalLM",
        {
            **{**SIZES, "q_lora_rank": 24, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
            **{"routed_scaling_factor": 3.0, "mlp_bias": False},
        },
    ),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        {
            **{**SIZES, "q_lora_rank": 24, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
            **{"rope_parameters": YARN, "num_mtp_layers": 0},
        },
    ),
    "deepseek-v3-halves": (
        "DeepseekV3ForCausalLM",
        {
            **{**SIZES, "q_lora_rank": None, "n_group": 2, "topk_group": 1, "rope_interleave": False},
            **{"n_shared_experts": 2, "norm_topk_prob": False, "num_mtp_layers": 0},
        },
    ),
    "kimi-linear": (
        "KimiLinearForCausalLM",
        {
            **{name: value for name, value in SIZES.items() if name != "num_experts_per_tok"},
            **{"num_experts": 8, "num_experts_per_token": 2, "num_expert_group": 2, "topk_group": 1},
            **{"linear_head_dim": 12, "linear_num_heads": 4, "linear_conv_kernel_dim": 3, "q_lora_rank": None},
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "glm-4.7-flash": (
        "Glm4MoeLiteForCausalLM",
        {**SIZES, "q_lora_rank": 24, "mlp_layer_types": ["dense", "dense", "sparse"]},
    ),
}


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, config = CASES["deepseek-v2-lite"]
    return save_random(tmp_path_factory.mktemp("lite"), architecture, **config)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return prompts_that_share()


@pytest.mark.parametrize("case", CASES)
def test_every_way_of_running_equals_hugging_face(tmp_path: Path, case: str, prompts: list[list[int]]) -> None:
    architecture, config = CASES[case]
    folder = save_random(tmp_path, architecture, **config)
    check_every_way_of_running(folder, prompts, max_num_batched_tokens=128, num_blocks=14, num_cached=64 + 16 + 48)


def test_deterministic_bits_are_those_of_a_miss(lite: Path, tmp_path: Path) -> None:
    for folder in (lite, save_random(tmp_path, "KimiLinearForCausalLM")):
        check_deterministic_bits(folder, prompt_len=60, num_before=40)


def tokens(folder: Path, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    with make_llm(folder, max_num_seqs=5, **options) as llm:
        first = [output.outputs[0].token_ids for output in llm.generate(prompts, ONE, use_tqdm=False)]
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, ONE, use_tqdm=False)] == first
    return first


def test_captured_steps_drafts_and_blocks_elsewhere_change_no_token(
    lite: Path, tmp_path: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens(lite, prompts)
    assert tokens(lite, prompts, speculative_config={"method": "ngram", "num_speculative_tokens": 3}) == expected
    tight = {"num_gpu_blocks_override": 14, "block_size": 8, "kv_offload_gb": 0.01, "prefix_store": str(tmp_path)}
    assert tokens(lite, prompts, **tight) == expected
    fake = fake_graphs(monkeypatch)
    assert tokens(lite, prompts, overlap_depth=2) == expected
    assert fake.num_decodes > 10 and fake.num_prompts > 0


def test_whole_prompts_alone_and_beside_decodes(
    lite: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have keys and values of each head; what comes behind them finds their latents in the cache."""
    forward_whole, seen = CpuLatentBackend.forward_whole, set()

    def noted(self: CpuLatentBackend, *arguments: Any) -> Tensor:
        seen.add(arguments[-1].meta.num_decodes)
        return forward_whole(self, *arguments)

    prompts = [prompt for prompt in prompts if len(prompt) > 1]  # one token is a decode
    expected = tokens(lite, prompts)
    monkeypatch.setattr(CpuLatentBackend, "forward_whole", noted)
    with make_llm(lite, max_num_seqs=2, enable_prefix_caching=False) as llm:
        some = [replace(ONE, max_tokens=n) for n in (12, 3, 12)]
        outputs = llm.generate(prompts, some, use_tqdm=False)
    for output, wanted, params in zip(outputs, expected, some, strict=True):
        assert output.outputs[0].token_ids == wanted[: params.max_tokens]
    assert seen == {0, 1}


def test_adapters_of_what_is_multiplied_as_it_stands(lite: Path, prompts: list[list[int]]) -> None:
    """They give what merged weights give; one for the matrix that is taken apart is refused by name."""
    hugging_face = load_hugging_face(lite)
    tensors = make_tensors(hugging_face, "q_proj|kv_a_proj_with_mqa|o_proj")
    taken_apart = request("other", make_tensors(hugging_face, "kv_b_proj"))
    with make_llm(lite, max_num_seqs=5, enable_lora=True) as llm:
        adapter = request("adapter", tensors)
        outputs = llm.generate(prompts, ONE, use_tqdm=False, lora_request=adapter)
        with pytest.raises(ValueError, match="kv_b_proj, and the model has no layer of that name that takes one"):
            llm.generate(prompts, ONE, use_tqdm=False, lora_request=taken_apart)
    found = [output.outputs[0].token_ids for output in outputs]
    check_greedy_outputs(merged(lite, tensors, scale=2.0), prompts, found)


def test_what_is_refused(lite: Path, tmp_path: Path) -> None:
    kimi = save_random(tmp_path / "kimi", "KimiLinearForCausalLM")
    with pytest.raises(NotImplementedError, match="kv_offload_gb and prefix_store cover layers"):
        make_llm(kimi, kv_offload_gb=0.01)
    edit_json(kimi / "config.json", linear_attn_config={"kda_layers": [1, 2], "full_attn_layers": [2]})
    with pytest.raises(ValueError, match="linear_attn_config does not name each of 2 layers once"):
        make_llm(kimi)
    hf = {**SIZES, "architectures": ["DeepseekV2ForCausalLM"], "vocab_size": 8, "hidden_size": 8}
    hf |= {"intermediate_size": 8, "num_attention_heads": 4}
    for changes, message in [
        ({"qk_head_dim": 21}, "qk_head_dim=21"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"kv_lora_rank": 0}, "kv_lora_rank"),
        ({"architectures": ["Glm4MoeLiteForCausalLM"], "mlp_layer_types": ["sparse", "dense", "sparse"]}, "mlp_layer"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_model_config({**hf, **changes}, "float32")
    folder = save_random(tmp_path, "DeepseekV2ForCausalLM", **SIZES)
    for changes, message in [
        ({"norm_topk_prob": True}, "norm_topk_prob=True"),
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        ({"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
    ]:
        edit_json(folder / "config.json", **{"norm_topk_prob": False, "scoring_func": "softmax", **changes})
        with pytest.raises(ValueError, match=message):
            make_llm(folder)
