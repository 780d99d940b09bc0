"""GGUF files as whole models: each architecture beside Hugging Face, each quantization beside its plain numbers."""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from nanovllm import LLM, SamplingParams
from nanovllm.cli.main import main
from nanovllm.model_files.gguf_file import GGUFFile
from nanovllm.quantization import gguf as gguf_linear
from nanovllm.quantization import quantized_linear
from nanovllm.weights.gguf import GGUFCheckpoint
from nanovllm.weights.gguf_architectures import read_architecture
from tests.gguf_files import Quantization, Quantized, convert, random_blocks
from tests.models.parity import check_greedy_outputs
from tests.models.test_gpt_oss import save as save_gpt_oss
from tests.tiny_models import (
    hugging_face_logits,
    load_hugging_face,
    random_prompts,
    record_logits,
    save_random,
)

NUM_OUTPUT = 8
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GPT_OSS: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 32, "head_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 3},
    **{"num_hidden_layers": 3, "sliding_window": 9},
}
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA4: dict[str, dict[str, Any]] = {
    "e2b": {"num_hidden_layers": 6, "layer_types": [SLIDING, FULL] * 3, "num_kv_shared_layers": 2},
    "31b": {
        **{"num_hidden_layers": 3, "layer_types": [SLIDING, SLIDING, FULL], "num_kv_shared_layers": 0},
        **{"num_key_value_heads": 4, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
        **{"hidden_size_per_layer_input": 0, "use_double_wide_mlp": False},
    },
    "26b-a4b": {
        **{"layer_types": [SLIDING, FULL, FULL], "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
        **{"enable_moe_block": True, "top_k_experts": 3},
    },
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"head_dim": 16}),
    "llama-llama3-rope-tied": (
        "LlamaForCausalLM",
        {"rope_parameters": LLAMA3, "head_dim": 16, "tie_word_embeddings": True},
    ),
    "llama-linear-rope-bias": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}, "attention_bias": True},
    ),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "lfm2": (
        "Lfm2ForCausalLM",
        {
            **{"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "lfm2moe": (
        "Lfm2MoeForCausalLM",
        {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "norm_eps": 0.01},
    ),
    "qwen35": (
        "Qwen3_5ForCausalLM",
        {
            **{"num_hidden_layers": 3, "layer_types": ["linear_attention", "linear_attention", "full_attention"]},
            **{"linear_num_value_heads": 6, "attention_bias": True},
            "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
        },
    ),
    "qwen35moe": (
        "Qwen3_5MoeForCausalLM",
        {
            **{"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
            "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
        },
    ),
    "qwen3next": (
        "Qwen3NextForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.25}},
    ),
    "gpt-oss": ("GptOssForCausalLM", GPT_OSS),
    "nemotron_h": ("NemotronHForCausalLM", {"use_conv_bias": False}),
    "nemotron_h_moe": (
        "NemotronHForCausalLM",
        {
            **{"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "routed_scaling_factor": 2.5},
            **{"moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 20, "n_group": 4, "topk_group": 2},
            "num_nextn_predict_layers": 1,
        },
    ),
    "kimi-linear": (
        "KimiLinearForCausalLM",
        {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "glm-4.7-flash": ("Glm4MoeLiteForCausalLM", {"num_nextn_predict_layers": 1}),
    "granitehybrid": ("GraniteMoeHybridForCausalLM", {"mamba_n_groups": 2, "position_embedding_type": None}),
    "granitehybrid-moe": (
        "GraniteMoeHybridForCausalLM",
        {"num_local_experts": 4, "intermediate_size": 24, "residual_multiplier": 0.3, "mamba_conv_bias": False},
    ),
    "qwen3moe": (
        "Qwen3MoeForCausalLM",
        {
            **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
            **{"head_dim": 16},
        },
    ),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 3, "head_dim": 16}),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            **{"num_hidden_layers": 7, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 9},
            **{"final_logit_softcapping": 20.0},
        },
    ),
    "gemma3-linear-rope": (
        "Gemma3ForCausalLM",
        {
            **{"num_hidden_layers": 6, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4},
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    **{
        f"gemma4-{size}": ("Gemma4ForCausalLM", {"final_logit_softcapping": 30.0, "sliding_window": 9, **fields})
        for size, fields in GEMMA4.items()
    },
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            **{"num_hidden_layers": 3, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 9},
            **{"final_logit_softcapping": 20.0, "attn_logit_softcapping": 3.0, "rope_theta": 10000.0},
        },
    ),
    "phi3-window": ("Phi3ForCausalLM", {"hidden_size": 64, "sliding_window": 7}),
    "phi3-longrope": (
        "Phi3ForCausalLM",
        {
            **{"hidden_size": 64, "max_position_embeddings": 64, "original_max_position_embeddings": 16},
            "rope_parameters": {
                **{"rope_type": "longrope", "rope_theta": 300.0, "partial_rotary_factor": 0.75},
                **{"short_factor": [1.0, 1.25, 1.5, 1.5, 1.75, 2.0], "long_factor": [1.0, 2.0, 4.0, 5.0, 6.0, 8.0]},
            },
        },
    ),
    "granite": (
        "GraniteForCausalLM",
        {
            **{"embedding_multiplier": 3.0, "residual_multiplier": 0.25, "logits_scaling": 5.0},
            **{"attention_multiplier": 0.5, "tie_word_embeddings": True},
        },
    ),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2}),
    "qwen2moe": ("Qwen2MoeForCausalLM", {}),
    "glm4moe": (
        "Glm4MoeForCausalLM",
        {"attention_bias": True, "routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2, "num_hidden_layers": 3},
    ),
    "glm4moe-qk-norm": ("Glm4MoeForCausalLM", {"use_qk_norm": True, "head_dim": 24, "num_mtp_layers": 0}),
    "deepseek2-v2": ("DeepseekV2ForCausalLM", {"q_lora_rank": None, "routed_scaling_factor": 2.0}),
    "deepseek2-v3": (
        "DeepseekV3ForCausalLM",
        {
            "num_mtp_layers": 0,
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 64},
                **{"mscale": 0.7, "mscale_all_dim": 0.7},
            },
        },
    ),
    "dots1": ("Dots1ForCausalLM", {"first_k_dense_replace": 1, "n_shared_experts": 2, "sliding_window": None}),
    "ernie4_5-moe": ("Ernie4_5_MoeForCausalLM", {"num_hidden_layers": 3, "intermediate_size": 96}),
    "hunyuan-moe": ("HunYuanMoEV1ForCausalLM", {"head_dim": 16}),
    "granitemoe": ("GraniteMoeForCausalLM", {"attention_multiplier": 0.2, "logits_scaling": 5.0}),
    "granitemoe-shared": ("GraniteMoeSharedForCausalLM", {"attention_multiplier": 0.2, "residual_multiplier": 0.5}),
    "smollm3": ("SmolLM3ForCausalLM", {"num_hidden_layers": 4, "rope_theta": 2000000.0}),
    "gemma": ("GemmaForCausalLM", {"head_dim": 24}),
    "seed-oss": ("SeedOssForCausalLM", {"head_dim": 16}),
    "olmo3": (
        "Olmo3ForCausalLM",
        {
            **{"num_hidden_layers": 5, "sliding_window": 6},
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
                "full_attention": {
                    **{"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0, "attention_factor": 1.1386294},
                    "original_max_position_embeddings": 16,
                },
            },
        },
    ),
    "exaone4": ("Exaone4ForCausalLM", {"num_hidden_layers": 5, "sliding_window": 6}),
    "exaone4-no-window": (
        "Exaone4ForCausalLM",
        {"sliding_window": None, "layer_types": ["full_attention"] * 2, "rope_parameters": LLAMA3},
    ),
    "chatglm": ("GlmForCausalLM", {"head_dim": 24}),
    "glm4": ("Glm4ForCausalLM", {"attention_bias": False}),
    "ernie-bias": ("Ernie4_5ForCausalLM", {"head_dim": 16, "use_bias": True, "tie_word_embeddings": False}),
    "arcee-bias": ("ArceeForCausalLM", {"mlp_bias": True, "head_dim": 24}),
    "hunyuan": (
        "HunYuanDenseV1ForCausalLM",
        {"head_dim": 16, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "alpha": 9.0, "factor": 1.0}},
    ),
    "starcoder2": ("Starcoder2ForCausalLM", {"norm_epsilon": 0.1}),
    "command-r": ("CohereForCausalLM", {"logit_scale": 0.5, "layer_norm_eps": 0.1}),
    "cohere2": ("Cohere2ForCausalLM", {"sliding_window": 6, "num_hidden_layers": 5, "logit_scale": 0.25}),
    "apertus": ("ApertusForCausalLM", {}),
    "granite4": ("GraniteMoeHybridForCausalLM", {"num_experts_per_tok": 0, "layer_types": ["attention"] * 2}),
    "ministral3": (
        "Ministral3ForCausalLM",
        {
            "head_dim": 16,
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16},
                **{"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.7},
            },
        },
    ),
    "qwen3-tied": ("Qwen3ForCausalLM", {"head_dim": 24, "tie_word_embeddings": True}),
}
PACKED = "Q4_0 Q4_1 Q8_0 Q4_K Q5_K Q6_K Q4_K_M".split()
QUANTIZATIONS = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split()


def run(model: Path, prompt: list[int], quantization: str | None = None) -> tuple[torch.Tensor, list[int]]:
    """(logits of every position, greedy tokens), in float32."""
    options = {"dtype": "float32", "skip_tokenizer_init": True, "quantization": quantization}
    with LLM(str(model), device="cpu", **options) as llm:
        logits = record_logits(llm)
        (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=NUM_OUTPUT), use_tqdm=False)
    return logits(), output.outputs[0].token_ids


@pytest.mark.filterwarnings("ignore:.*multi-token prediction")
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_hugging_face(tmp_path: Path, case: str) -> None:
    """The same weights, once as safetensors and once as GGUF."""
    architecture, config = CASES[case]
    folder = save_random(tmp_path, architecture, **config)
    prompt = random_prompts([30])[0]
    logits, token_ids = run(convert(folder, tmp_path / "m.gguf"), prompt)
    hf = load_hugging_face(folder)
    want = hugging_face_logits(hf, prompt + token_ids[:-1])
    # Gemma's logits are fifty in size, and transformers' own are 9e-5 from what they are in float64.
    torch.testing.assert_close(logits, want, atol=max(1e-4, 4e-6 * float(want.abs().max())), rtol=0)
    check_greedy_outputs(hf, [prompt], [token_ids])


@pytest.mark.parametrize("case", ["llama-linear-rope-bias", "qwen3moe", "ernie-bias"])
def test_projections_in_one_tensor(tmp_path: Path, case: str) -> None:
    """As the converter writes them where it is asked to: queries with keys and values, gate with up of experts."""
    architecture, config = CASES[case]
    folder = save_random(tmp_path, architecture, **config)
    (prompt,) = random_prompts([20])
    logits, _ = run(convert(folder, tmp_path / "apart.gguf"), prompt)
    found, _ = run(convert(folder, tmp_path / "fused.gguf", is_fused=True), prompt)
    torch.testing.assert_close(found, logits, atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["F16", "BF16", *QUANTIZATIONS, "Q4_K_M"])
def test_quantized_models_equal_their_numbers(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of block, in every matrix; the same numbers as plain float32 give the same logits.

    "Q4_K_M" is a mixture, in which values have other blocks than queries and keys. Those that can stay packed give as
    much, but for scales that are rounded; inputs that are rounded too, in one way whoever multiplies them, cost little.
    """
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 1}
    folder = save_random(tmp_path, "Qwen3ForCausalLM", **sizes, head_dim=64)
    numbers = load_file(folder / "model.safetensors")
    hf_names = {convert_name(name): name for name in numbers}

    def quantize(name: str, matrix: np.ndarray) -> Quantized:
        is_finer = kind == "Q4_K_M" and name.endswith(("attn_v.weight", "token_embd.weight"))
        quantization = Quantization["Q6_K" if is_finer else kind.removesuffix("_M")]
        if kind in ("F16", "BF16"):
            blocks = gguf.quants.quantize(matrix, quantization)
        else:
            blocks = random_blocks(quantization, matrix.shape, len(name), 0.06)
        numbers[hf_names[name]] = gguf.quants.dequantize(blocks, quantization).astype(np.float32)
        return blocks, quantization

    path = convert(folder, tmp_path / "m.gguf", quantize)
    save_file(numbers, folder / "model.safetensors", metadata={"format": "pt"})
    prompt = random_prompts([20])[0]
    logits, token_ids = run(path, prompt)
    plain_logits, plain_token_ids = run(folder, prompt)
    assert token_ids == plain_token_ids
    assert torch.equal(logits, plain_logits)
    assert logits.std() > 0.1
    if kind in PACKED:
        prompt += token_ids[:-1]
        rounded, _ = run(path, prompt, "gguf")
        monkeypatch.setattr(gguf_linear, "rounded_product", lambda weight: None)
        rounded_apart, _ = run(path, prompt, "gguf")
        monkeypatch.setattr(quantized_linear, "round_rows", lambda x, *args: x)
        exact, _ = run(path, prompt, "gguf")
        errors = [(x[: len(logits)] - logits).norm() / logits.norm() for x in (exact, rounded)]
        assert errors[0] < (1e-2 if "_K" in kind else 1e-5) and errors[1] < 0.1
        assert (rounded - rounded_apart).norm() / logits.norm() < 2e-3  # the few codes that another order rounds apart


@pytest.mark.parametrize("case", "lfm2 qwen35 qwen3next granitehybrid nemotron_h kimi-linear gemma4-31b".split())
def test_matrices_that_hold_several_things_stay_packed(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or that have a name of their own; and but for the rounding of inputs, they give the same."""
    architecture, config = CASES[case]
    folder = save_random(tmp_path, architecture, **config)
    packed: list[str] = []

    def quantize(name: str, matrix: np.ndarray) -> Quantized:
        fits = matrix.ndim == 2 and matrix.shape[1] % 32 == 0 and not name.endswith(("conv1d.weight", "ssm_a"))
        kind = Quantization.Q8_0 if fits else Quantization.F32
        packed.extend([name] if fits and not name.endswith("ssm_out.weight") else [])
        return gguf.quants.quantize(matrix.astype(np.float32), kind), kind

    path = convert(folder, tmp_path / "m.gguf", quantize)
    monkeypatch.setattr(gguf_linear, "rounded_product", lambda weight: None)
    monkeypatch.setattr(quantized_linear, "round_rows", lambda x, *args: x)
    prompt = random_prompts([20])[0]
    (logits, token_ids), (found, ids) = (run(path, prompt, kind) for kind in (None, "gguf"))
    torch.testing.assert_close(found, logits, atol=1e-4, rtol=0)
    assert ids == token_ids
    if case == "lfm2":  # and what is random in their places is of their form
        options = {"dtype": "float32", "skip_tokenizer_init": True, "quantization": "gguf", "load_format": "dummy"}
        with LLM(str(path), device="cpu", **options) as llm:
            assert llm.generate([prompt], SamplingParams(max_tokens=2), use_tqdm=False)[0].finished
    names = [name for name, _ in GGUFCheckpoint(path, is_packed=True).headers()]
    assert len(packed) > 5 and sum(name.endswith("_codes") for name in names) >= len(packed)


@pytest.mark.parametrize("case", ["qwen3next", "granitehybrid-moe", "gemma4-e2b", "gpt-oss"])
def test_check_model_has_transformers_compute_what_it_cannot_read(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture, config = CASES[case]
    path = convert(save_random(tmp_path / "hf", architecture, **config), tmp_path / "m.gguf")
    assert main(["check-model", str(path)]) == 0
    shown = capsys.readouterr()
    assert "check-model: PASS logits=" in shown.out and "it is read here for it" in shown.err


def test_gemma4_whose_rotation_is_stretched_is_refused(tmp_path: Path) -> None:
    architecture, config = CASES["gemma4-e2b"]
    file = GGUFFile(convert(save_random(tmp_path / "hf", architecture, **config), tmp_path / "m.gguf"))
    read_architecture(file)
    file.metadata |= {"gemma4.rope.scaling.type": "linear", "gemma4.rope.scaling.factor": 8.0}
    with pytest.raises(NotImplementedError, match=r"rope\.scaling is not supported for gemma4"):
        read_architecture(file)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_experts_of_gpt_oss_stay_in_mxfp4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the other matrices unpacked, or packed too; but not in a layer whose experts are not all in it."""
    folder = save_gpt_oss(tmp_path / "hf", is_packed=True, **GPT_OSS, swiglu_limit=7.0)
    prompt = random_prompts([30])[0]
    logits, token_ids = run(folder, prompt)
    for num_unpacked, unpacked in enumerate(((), ("blk.1.ffn_down_exps.weight",))):
        path = convert(folder, tmp_path / f"{num_unpacked}.gguf", unpacked=unpacked)
        found, ids = run(path, prompt)
        torch.testing.assert_close(found, logits, atol=1e-4, rtol=0)
        assert ids == token_ids
        names = [name for name, _ in GGUFCheckpoint(path).headers()]
        assert sum(name.endswith("_blocks") for name in names) == 2 * (3 - num_unpacked)

    def quantize(name: str, matrix: np.ndarray) -> Quantized:
        kind = Quantization.Q8_0 if name.endswith(("output.weight", "attn_k.weight")) else Quantization.F32
        return gguf.quants.quantize(matrix, kind), kind

    path = convert(folder, tmp_path / "q8.gguf", quantize)
    names = [name for name, _ in GGUFCheckpoint(path, is_packed=True).headers()]
    assert "lm_head.weight_codes" in names and sum(name.endswith("_blocks") for name in names) == 2 * 3
    monkeypatch.setattr(gguf_linear, "rounded_product", lambda weight: None)
    monkeypatch.setattr(quantized_linear, "round_rows", lambda x, *args: x)
    (logits, token_ids), (packed, packed_ids) = (run(path, prompt, kind) for kind in (None, "gguf"))
    torch.testing.assert_close(packed, logits, atol=1e-4, rtol=0)
    assert packed_ids == token_ids


def test_only_gguf_files_stay_packed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantization='gguf' is for GGUF files, and safetensors are read from"):
        run(save_random(tmp_path), [1], "gguf")


def convert_name(name: str) -> str | None:
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 1).get_name(name, (".weight", ".bias"))


# -- files that were tampered with --


def rewrite(source: Path, path: Path, **changes: np.ndarray | None) -> Path:
    """A copy with tensors replaced, added, or (None) left out; "." is written "__"."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "qwen3")
    for field in reader.fields.values():
        if field.name.startswith("qwen3."):
            value = field.contents()
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(field.name, value)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    for name, tensor in tensors.items():
        if tensor is not None:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blk__1__attn_q_norm__weight": None}, "no tensor 'model.layers.1.self_attn.q_norm.weight'"),
        ({"output_norm__weight": None}, "no tensor 'model.norm.weight'"),
        ({"output__weight": None}, None),  # then the head is the embedding
        ({"blk__2__attn_norm__weight": np.ones(32, np.float32)}, "'model.layers.2.input_layernorm.weight', which"),
        ({"blk__0__ffn_gate_inp__weight": np.ones((4, 32), np.float32)}, "tensor blk.0.ffn_gate_inp.weight has no"),
        ({"blk__0__ffn_up__weight": np.ones((47, 32), np.float32)}, "'model.layers.0.mlp.up_proj.weight' has shape"),
        ({"blk__0__attn_norm__weight": np.ones((1, 32), np.float32)}, "'model.layers.0.input_layernorm.weight' has"),
    ],
)
def test_missing_extra_and_misshapen_tensors_are_named(
    tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    source = convert(save_random(tmp_path, "Qwen3ForCausalLM", head_dim=16), tmp_path / "m.gguf")
    path = rewrite(source, tmp_path / "tampered.gguf", **changes)
    if message is None:
        run(path, [1, 2, 3])
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        run(path, [1, 2, 3])


@pytest.mark.parametrize("share", [0.2, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path: Path, share: float) -> None:
    """Cut in the header, in the middle, and just before the end."""
    path = convert(save_random(tmp_path, "Qwen3ForCausalLM", head_dim=16), tmp_path / "m.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"m\.gguf is truncated"):
        run(path, [1, 2, 3])
