"""Logits and greedy tokens of every architecture beside Hugging Face, on tiny random checkpoints of odd shapes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import SamplingParams
from nanovllm.kernels.rms_norm import add_rms_norm, rms_norm
from tests.models.parity import NUM_OUTPUT, check_greedy_tokens, check_logits, make_llm
from tests.tiny_models import (
    edit_json,
    hugging_face_greedy,
    hugging_face_logits,
    load_hugging_face,
    random_prompts,
    record_logits,
    save_random,
)

# name: (architecture, config). Windows are shorter than the prompts.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-gqa7-d64": (
        "LlamaForCausalLM",
        {"hidden_size": 42, "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 64},
    ),
    "llama-mha-d80-tied": ("LlamaForCausalLM", {"num_key_value_heads": 4, "head_dim": 80, "tie_word_embeddings": True}),
    "llama-d96-bias": ("LlamaForCausalLM", {"head_dim": 96, "attention_bias": True}),
    "llama-mlp-bias": ("LlamaForCausalLM", {"mlp_bias": True}),
    "llama-all-bias-tied": (
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    ),
    "mistral-d128": ("MistralForCausalLM", {"head_dim": 128, "sliding_window": None}),
    "mistral-gqa7-window": (
        "MistralForCausalLM",
        {"hidden_size": 42, "num_attention_heads": 14, "head_dim": 64, "sliding_window": 7},
    ),
    "mistral-tied-window-2": ("MistralForCausalLM", {"sliding_window": 2, "tie_word_embeddings": True}),
    "ministral-some-windows": (
        "MinistralForCausalLM",
        {"sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"], "head_dim": 24},
    ),
    "seed-oss": ("SeedOssForCausalLM", {"head_dim": 24, "residual_dropout": 0.0, "attention_dropout": 0.0}),
    "seed-oss-all-bias": (
        "SeedOssForCausalLM",
        {
            **{"head_dim": 16, "attention_out_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
            **{"residual_dropout": 0.1, "attention_bias": False},
        },
    ),
    "gemma": ("GemmaForCausalLM", {"head_dim": 24, "num_key_value_heads": 1}),
    "qwen2-tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-gqa7-d64": (
        "Qwen2ForCausalLM",
        {"hidden_size": 448, "num_attention_heads": 7, "num_key_value_heads": 1},
    ),
    "qwen2-window-upper-layers": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen2-window-switched-off": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3-d128-tied": ("Qwen3ForCausalLM", {"head_dim": 128, "tie_word_embeddings": True}),
    "qwen3-gqa7-d80-bias": (
        "Qwen3ForCausalLM",
        {"hidden_size": 42, "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 80, "attention_bias": True},
    ),
    "qwen3-window": (
        "Qwen3ForCausalLM",
        {"head_dim": 96, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "smollm3": ("SmolLM3ForCausalLM", {"num_hidden_layers": 4}),
    "smollm3-window-bias": (
        "SmolLM3ForCausalLM",
        {
            **{"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 6, "head_dim": 64},
            **{"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        },
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            **{"hidden_size": 42, "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 80},
            **{"sliding_window": 9, "query_pre_attn_scalar": 3},
            **{"attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0},
        },
    ),
    "gemma2-no-softcap-d256": (
        "Gemma2ForCausalLM",
        {
            **{"head_dim": 256, "sliding_window": 5, "attention_bias": True, "tie_word_embeddings": False},
            **{"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 100},
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {"num_hidden_layers": 3, "sliding_window_pattern": 3, "head_dim": 96, "sliding_window": 8},
    ),
    "gemma3-linear-softcap": (
        "Gemma3ForCausalLM",
        {
            **{"head_dim": 64, "sliding_window": 5, "final_logit_softcapping": 3.0, "num_key_value_heads": 4},
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "phi3-d80": ("Phi3ForCausalLM", {"hidden_size": 320, "sliding_window": None}),
    "phi3-window": ("Phi3ForCausalLM", {"sliding_window": 7, "hidden_size": 64}),
    "phi4-partial": (
        "Phi3ForCausalLM",
        {
            **{"hidden_size": 64, "tie_word_embeddings": True},
            "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.75},
        },
    ),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmo2-gqa7-d64-bias": (
        "Olmo2ForCausalLM",
        {"hidden_size": 448, "num_attention_heads": 7, "num_key_value_heads": 1, "attention_bias": True},
    ),
    "granite": (
        "GraniteForCausalLM",
        {
            **{"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 5.0},
            **{"attention_multiplier": 0.6, "tie_word_embeddings": True},
        },
    ),
    "granite-bias-d64": (
        "GraniteForCausalLM",
        {"head_dim": 64, "attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.1},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, config = CASES[request.param]
    return save_random(tmp_path_factory.mktemp(request.param), architecture, **config)


@pytest.fixture(scope="module")
def hugging_face(checkpoint: Path) -> Any:
    return load_hugging_face(checkpoint)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    prompts = random_prompts([1, 40, 3, 17, 32, 33, 8])
    return [*prompts, prompts[1][:32] + prompts[2]]  # the last shares whole blocks with another one


@pytest.fixture(scope="module")
def expected(hugging_face: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [hugging_face_greedy(hugging_face, prompt, NUM_OUTPUT) for prompt in prompts]


@pytest.mark.parametrize("max_num_batched_tokens", [256, 5], ids=["whole", "chunked"])
def test_logits_of_prompt_and_output_equal_hugging_face(
    checkpoint: Path, hugging_face: Any, max_num_batched_tokens: int
) -> None:
    check_logits(checkpoint, hugging_face, max_num_batched_tokens)


SMALL: dict[str, dict[str, Any]] = {
    "batch": {},
    "chunks": {"max_num_seqs": 4, "max_num_batched_tokens": 7},
    "overlap": {"overlap_depth": 2, "max_num_batched_tokens": 16},
    "preempting": {"num_gpu_blocks_override": 7, "block_size": 8, "enable_prefix_caching": False},
    "preempting-cached-overlap": {"num_gpu_blocks_override": 7, "block_size": 8, "overlap_depth": 2},
}


@pytest.mark.parametrize("way", SMALL)
def test_greedy_tokens_equal_hugging_face_in_every_way_of_running(
    checkpoint: Path, prompts: list[list[int]], expected: list[list[int]], way: str
) -> None:
    """As a batch, in small chunks, overlapped, preempted, and again with a warm prefix cache."""
    check_greedy_tokens(checkpoint, prompts, expected, preempts=way.startswith("preempting"), **SMALL[way])


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "BloomForCausalLM", "NoSuchForCausalLM"])
def test_unsupported_architectures_are_refused_by_name(tmp_path: Path, architecture: str) -> None:
    """And before any weight is looked at."""
    folder = save_random(tmp_path)
    edit_json(folder / "config.json", architectures=[architecture])
    with pytest.raises(ValueError, match=architecture):
        make_llm(folder)


@pytest.mark.parametrize("architectures", [None, []])
def test_a_config_without_architecture_is_refused(tmp_path: Path, architectures: Any) -> None:
    folder = save_random(tmp_path)
    edit_json(folder / "config.json", architectures=architectures)
    with pytest.raises(ValueError, match="architecture"):
        make_llm(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 16), (3, 4, 64)])
def test_norms_leave_their_inputs_unchanged(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    before = [tensor.clone() for tensor in (x, residual, weight)]
    normed = rms_norm(x, weight, 1e-6)
    summed, total = add_rms_norm(x, residual, weight, 1e-6)
    for tensor, old in zip((x, residual, weight), before, strict=True):
        assert torch.equal(tensor, old)
    assert {t.data_ptr() for t in (normed, summed, total)}.isdisjoint(t.data_ptr() for t in (x, residual, weight))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gemma2", "gemma2-no-softcap-d256", "gemma3", "phi4-partial", "olmo2", "granite"])
def test_half_precisions_are_as_near_to_the_truth_as_hugging_face(tmp_path: Path, name: str, dtype: str) -> None:
    """Rounding differs, meaning does not: measured against float32."""
    from transformers import AutoModelForCausalLM

    architecture, config = CASES[name]
    folder = save_random(tmp_path, architecture, **config)
    prompt = random_prompts([30])[0]
    with make_llm(folder, dtype=dtype) as llm:
        logits = record_logits(llm)
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    options = {"dtype": getattr(torch, dtype), "attn_implementation": "eager"}
    theirs = hugging_face_logits(AutoModelForCausalLM.from_pretrained(folder, **options).eval(), prompt).float()
    exact = hugging_face_logits(load_hugging_face(folder), prompt)
    error, their_error = ((values - exact).abs().max() for values in (logits().float(), theirs))
    assert error < 3 * their_error


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precisions_stay_near_hugging_face_in_the_same_dtype(tmp_path: Path, dtype: str) -> None:
    """Rounding differs, meaning does not."""
    from transformers import AutoModelForCausalLM

    folder = save_random(tmp_path, "Qwen3ForCausalLM", head_dim=64)
    prompt = random_prompts([30])[0]
    with make_llm(folder, dtype=dtype) as llm:
        logits = record_logits(llm)
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    expected = hugging_face_logits(hf, prompt).float()
    error = (logits().float() - expected).abs().max() / expected.abs().max()
    assert error < (0.05 if dtype == "bfloat16" else 0.01)
