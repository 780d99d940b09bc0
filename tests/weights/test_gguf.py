import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from nanovllm.model_files.gguf_file import TensorInfo
from nanovllm.weights.gguf import GGUFCheckpoint
from nanovllm.weights.gguf_blocks import dequantize
from tests.gguf_files import (
    HEAD_DIM,
    HIDDEN,
    LAYERS,
    VOCABULARY,
    Quantization,
    byte_level_keys,
    hf_name,
    llama3_divisors,
    metadata,
    tiny_tensors,
    write_gguf,
)

UNPACKED_HERE = [Quantization[name] for name in "Q4_0 Q4_1 Q8_0 Q4_K Q5_K Q6_K".split()]
UNPACKED_BY_GGUF = [
    Quantization[name] for name in "Q5_0 Q5_1 Q2_K Q3_K TQ1_0 TQ2_0 IQ2_XXS IQ2_S IQ3_S IQ4_NL IQ4_XS MXFP4".split()
]


def _checkpoint(tmp_path: Path, architecture: str = "llama", **options: Any) -> GGUFCheckpoint:
    keys = metadata(architecture, **options.pop("changes", {})) | options.pop("keys", {})
    tensors = tiny_tensors() | options.pop("tensors", {})
    return GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", architecture, keys, tensors, **options))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("quantization", [None, Quantization.F16, Quantization.Q8_0])
def test_round_trip(tmp_path: Path, architecture: str, quantization: Quantization | None) -> None:
    """Names, shapes, values and the row order of queries and keys; only `llama` files have those permuted."""
    written = tiny_tensors()
    read = dict(_checkpoint(tmp_path, architecture, quantization=quantization).tensors(torch.float32))
    assert set(read) == {hf_name(name) for name in written}
    for name, values in written.items():
        if quantization is not None and values.ndim == 2:
            values = gguf.quants.dequantize(gguf.quants.quantize(values, quantization), quantization)
        torch.testing.assert_close(read[hf_name(name)].float(), torch.from_numpy(values), rtol=0, atol=0)


def test_text_models_of_qwen3_vl(tmp_path: Path) -> None:
    """What their metadata say of images changes nothing."""
    text = _checkpoint(tmp_path, "qwen3").config
    of_images = {"rope__dimension_sections": [24, 20, 20, 0], "n_deepstack_layers": 3}
    assert _checkpoint(tmp_path, "qwen3vl", changes=of_images).config == text


def test_row_order_of_one_head(tmp_path: Path) -> None:
    """Hugging Face's a0 a1 .. b0 b1 .. is stored as a0 b0 a1 b1 ..; a bias is reordered like its matrix."""
    stored = np.repeat(np.arange(4 * HEAD_DIM, dtype=np.float32)[:, None], HIDDEN, axis=1)
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata("llama").items():
        writer.add_float32(key, value) if isinstance(value, float) else writer.add_uint32(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((VOCABULARY, HIDDEN), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", stored)
    writer.add_tensor("blk.0.attn_q.bias", stored[:, 0].copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = dict(GGUFCheckpoint(path).tensors(torch.float32))
    expected = [
        head * HEAD_DIM + 2 * pair + half for head in range(4) for half in (0, 1) for pair in range(HEAD_DIM // 2)
    ]
    assert tensors["model.layers.0.self_attn.q_proj.weight"][:, 0].tolist() == expected
    assert tensors["model.layers.0.self_attn.q_proj.bias"].tolist() == expected


@pytest.mark.parametrize("kind", UNPACKED_HERE + UNPACKED_BY_GGUF, ids=lambda kind: kind.name)
def test_dequantize_equals_the_gguf_package(kind: Quantization) -> None:
    """Bit for bit, on random blocks, whose scales include NaN, infinities and denormals."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(kind).integers(0, 256, (7, 3 * block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(rows, kind)
        read = dequantize(rows, TensorInfo("t", (7, 3 * block_size), kind, 0, rows.size))
    assert read.dtype == torch.float32
    assert np.array_equal(read.numpy(), expected, equal_nan=True)


@pytest.mark.parametrize("kind, dtype", [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_plain_floats_keep_their_type(kind: str, dtype: torch.dtype) -> None:
    values = torch.randn(3, 5).to(dtype)
    rows = values.view(torch.uint8).numpy()
    assert torch.equal(dequantize(rows, TensorInfo("t", (3, 5), Quantization[kind], 0, rows.size)), values)


def test_kind_that_cannot_be_unpacked_is_named() -> None:
    with pytest.raises(NotImplementedError, match="tensor t is quantized as Q8_K"):
        dequantize(np.zeros((1, 292), np.uint8), TensorInfo("t", (1, 256), Quantization.Q8_K, 0, 292))


def test_config(tmp_path: Path) -> None:
    tokenizer = byte_level_keys(eot_token_id=7)
    checkpoint = _checkpoint(tmp_path, "qwen3", changes={"attention__key_length": HEAD_DIM}, keys=tokenizer)
    config = checkpoint.config
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["vocab_size"] == VOCABULARY and config["num_hidden_layers"] == LAYERS
    assert config["tie_word_embeddings"] and not config["attention_bias"]
    assert config["rope_scaling"] is None and config["dtype"] == "float32"
    assert checkpoint.generation_config == {"eos_token_id": [263, 7], "bos_token_id": 262, "pad_token_id": 263}


def test_gemma3_config(tmp_path: Path) -> None:
    """What its files leave out is as llama.cpp has it: every sixth layer sees all, and the 27B's queries are scaled."""
    changes = {"attention__key_length": HEAD_DIM, "block_count": 12, "attention__sliding_window": 9}
    config = _checkpoint(tmp_path, "gemma3", changes=changes).config
    assert config["layer_types"] == (["sliding_attention"] * 5 + ["full_attention"]) * 2
    assert config["rope_parameters"]["sliding_attention"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert config["query_pre_attn_scalar"] == HEAD_DIM and config["final_logit_softcapping"] is None
    local = {"rope__freq_base_swa": 500.0, "attention__sliding_window_pattern": 2, "final_logit_softcapping": 30.0}
    config = _checkpoint(tmp_path, "gemma3", changes={**changes, **local}).config
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 6
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 500.0
    assert config["final_logit_softcapping"] == 30.0
    listed = {"block_count": 3, "attention__sliding_window_pattern": [True, False, True]}
    config = _checkpoint(tmp_path, "gemma3", changes={**changes, **listed}).config
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    large = {**changes, "block_count": 62, "attention__key_length": 8, "attention__sliding_window": None}
    config = _checkpoint(tmp_path, "gemma3", changes=large).config
    assert config["query_pre_attn_scalar"] == HIDDEN // 4
    assert set(config["layer_types"]) == {"full_attention"}


def test_untied_head_and_dtype(tmp_path: Path) -> None:
    head = tiny_tensors(1)["token_embd.weight"]
    checkpoint = _checkpoint(tmp_path, tensors={"output.weight": head}, quantization=Quantization.F16)
    assert not checkpoint.config["tie_word_embeddings"]
    assert checkpoint.config["dtype"] == "float16"
    assert torch.equal(dict(checkpoint.tensors(torch.float32))["lm_head.weight"], torch.from_numpy(head).half())
    assert _checkpoint(tmp_path, quantization=Quantization.Q4_1).config["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "changes, scaling",
    [
        ({"rope__scaling__type": "none"}, None),
        ({"rope__scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__original_context_length": 64,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, changes: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    assert _checkpoint(tmp_path, changes=changes).config["rope_scaling"] == scaling


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognized(tmp_path: Path, factor: float) -> None:
    divisors = {"rope_freqs.weight": llama3_divisors(500000.0, HEAD_DIM, factor)}
    checkpoint = _checkpoint(tmp_path, changes={"rope__freq_base": 500000.0}, tensors=divisors)
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert not any("rope" in name for name, _ in checkpoint.tensors(torch.float32))


def test_other_frequency_divisors_are_refused(tmp_path: Path) -> None:
    divisors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    with pytest.raises(NotImplementedError, match=r"rope_freqs\.weight is not Llama 3's"):
        _checkpoint(tmp_path, tensors={"rope_freqs.weight": divisors})


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"rope__scaling__type": "longrope"}, "longrope"),
        ({"rope__scaling__attn_factor": 2.0}, "attn_factor = 2.0"),
        ({"rope__dimension_count": HEAD_DIM // 2}, "dimension_count = 8"),
        ({"attention__value_length": 8}, "value_length = 8"),
        ({"attention__causal": False}, "causal = False"),
        ({"logit_scale": 2.0}, "logit_scale = 2.0 is not understood"),
        ({"attention__sliding_window": 64}, "sliding_window = 64 is not understood"),
        ({"attention__head_count": [4, 2]}, r"head_count differs between layers: \[4, 2\]"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], name: str) -> None:
    with pytest.raises(NotImplementedError, match=name):
        _checkpoint(tmp_path, changes=changes)


def test_experts_of_other_architectures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match=r"qwen2\.expert_count = 8 is not understood"):
        _checkpoint(tmp_path, "qwen2", changes={"expert_count": 8})
    with pytest.raises(ValueError, match=r"llama\.expert_used_count is missing"):
        _checkpoint(tmp_path, changes={"expert_count": 8})
    one_tensor_each = {"blk.0.ffn_gate.0.weight": np.zeros((4, 4), np.float32)}  # llama.cpp before spring 2024
    checkpoint = _checkpoint(tmp_path, changes={"expert_count": 1, "expert_used_count": 1}, tensors=one_tensor_each)
    with pytest.raises(ValueError, match=r"tensor blk\.0\.ffn_gate\.0\.weight has no place in a Mixtral"):
        list(checkpoint.tensors(torch.float32))
    flat = {"blk.0.ffn_gate_exps.weight": np.zeros((4, 4), np.float32)}
    checkpoint = _checkpoint(tmp_path, changes={"expert_count": 1, "expert_used_count": 1}, tensors=flat)
    with pytest.raises(ValueError, match=r"ffn_gate_exps\.weight of shape \(4, 4\) does not hold experts"):
        list(checkpoint.tensors(torch.float32))


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match=r"architecture 'mamba'.*llama, qwen2, qwen3, qwen3vl, gemma2"):
        _checkpoint(tmp_path, "mamba")
    with pytest.raises(ValueError, match=r"split\.count is 3, but by its name it is one of 1 files"):
        _checkpoint(tmp_path, keys={"split.count": 3})
    with pytest.raises(NotImplementedError, match="'adapter', not a model"):
        _checkpoint(tmp_path, keys={"general.type": "adapter"})
    with pytest.raises(ValueError, match=r"llama\.block_count is missing"):
        _checkpoint(tmp_path, changes={"block_count": None})


def test_what_files_of_dense_families_leave_out_or_say_in_vain(tmp_path: Path) -> None:
    exaone = {"exaone4.block_count": 64}
    config = _checkpoint(tmp_path, "exaone4", keys=exaone).config  # the 32B, whose window llama.cpp knows by heart
    assert config["sliding_window"] == 4096
    assert config["layer_types"][:5] == [*["sliding_attention"] * 3, "full_attention", "sliding_attention"]
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 8.0, "rope__scaling__original_context_length": 64}
    for factor in (1.0, 1.2079441):  # YaRN's own for 8
        changes = {**yarn, "attention__sliding_window": 16, "rope__scaling__yarn_attn_factor": factor}
        ropes = _checkpoint(tmp_path, "olmo2", changes=changes).config["rope_parameters"]
        assert ropes["full_attention"]["rope_type"] == "yarn" and "attention_factor" not in ropes["full_attention"]
        assert ropes["sliding_attention"] == {"rope_type": "default", "rope_theta": 10000.0}
    with pytest.raises(NotImplementedError, match=r"yarn_attn_factor = 1\.5 is not supported"):
        _checkpoint(tmp_path, "olmo2", changes={**yarn, "rope__scaling__yarn_attn_factor": 1.5})
    with pytest.raises(NotImplementedError, match="temperature_scale without YaRN"):
        _checkpoint(tmp_path, "mistral3", changes={"attention__temperature_scale": 0.1})
    assert _checkpoint(tmp_path, "mistral3").config["architectures"] == ["MistralForCausalLM"]
    for given in ({}, {"xielu.alpha_p": [1.0]}, {"xielu.alpha_p": 1.0}):
        with pytest.raises(ValueError, match=rf"xielu\.alpha_p must have a number for each of {LAYERS} layers"):
            _checkpoint(tmp_path, "apertus", keys=given)


def test_unexpected_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match=r"rope_factors_long\.weight is not supported for llama"):
        _checkpoint(tmp_path, tensors={"rope_factors_long.weight": np.zeros((4, 4), np.float32)})
    for name in ("blk.0.ffn_gate_inp.weight", "cls.output.weight"):
        checkpoint = _checkpoint(tmp_path, tensors={name: np.zeros((4, 4), np.float32)})
        with pytest.raises(ValueError, match=f"tensor {name} has no place in a LlamaForCausalLM"):
            list(checkpoint.tensors(torch.float32))


@pytest.mark.parametrize(
    "architecture, changes",
    [
        ("qwen3", {"expert_feed_forward_length": 0, "expert_shared_feed_forward_length": 0, "expert_count": 0}),
        ("llama", {"attention__sliding_window": 0, "logit_scale": 1.0, "attention__clamp_kqv": 0.0}),
        ("qwen2", {"attention__causal": True, "rope__scaling__attn_factor": 1.0, "leading_dense_block_count": 0}),
    ],
)
def test_keys_that_say_that_something_is_not_there_are_read(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    _checkpoint(tmp_path, architecture, changes=changes)
    for name in changes:
        with pytest.raises(NotImplementedError, match=name.replace("__", r"\.")):
            _checkpoint(tmp_path, architecture, changes={**changes, name: 3.0})


def test_yarn_betas_are_read(tmp_path: Path) -> None:
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 64}
    betas = {"rope__scaling__yarn_beta_fast": 32.0, "rope__scaling__yarn_beta_slow": 2.0}
    scaling = _checkpoint(tmp_path, changes={**yarn, **betas}).config["rope_scaling"]
    assert scaling["beta_slow"] == 2.0 and "beta_fast" not in scaling


@pytest.mark.parametrize(
    "key, values",
    [
        ("attention.head_count", (0, "x")),
        ("embedding_length", ("64", 63)),
        ("block_count", ("x", 2.5, True)),
        ("rope.freq_base", ("x", float("nan"), float("inf"))),
        ("rope.scaling.type", (3,)),
    ],
)
def test_metadata_that_cannot_be_are_refused_by_name(tmp_path: Path, key: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"m\.gguf.*{re.escape(key)}"):
            _checkpoint(tmp_path, changes={key.replace(".", "__"): value})


@pytest.mark.parametrize("quantization", [None, Quantization.Q8_0])
def test_a_model_in_several_files(tmp_path: Path, quantization: Quantization | None) -> None:
    """As llama-gguf-split writes them: any of them names the model; none may be missing or renamed."""
    tensors = tiny_tensors()
    names = sorted(tensors)
    paths = [tmp_path / f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for number, path in enumerate(paths):
        keys = {"split.no": number, "split.count": 3, "split.tensors.count": len(names)}
        part = {name: tensors[name] for name in names[number::3]}
        write_gguf(path, "llama", keys | (metadata("llama") if number == 0 else {}), part, quantization)
    whole = write_gguf(tmp_path / "whole.gguf", "llama", metadata("llama"), tensors, quantization)
    expected = dict(GGUFCheckpoint(whole).tensors(torch.float32))
    for path in paths:
        read = dict(GGUFCheckpoint(path).tensors(torch.float32))
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[name], expected[name]) for name in expected)
    paths[1].rename(tmp_path / "x.gguf")
    with pytest.raises(ValueError, match=r"m-00002-of-00003\.gguf is missing beside m-00003"):
        GGUFCheckpoint(paths[2])
    with pytest.raises(ValueError, match=r"x\.gguf: split.count is 3, but by its name it is one of 1"):
        GGUFCheckpoint(tmp_path / "x.gguf")


@pytest.mark.parametrize("kind", UNPACKED_HERE + UNPACKED_BY_GGUF[:4], ids=lambda kind: kind.name)
def test_numbers_in_the_dtype_of_the_model_are_rounded_once(kind: Quantization) -> None:
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(kind).integers(0, 256, (700, 3 * block_bytes), dtype=np.uint8)
    info = TensorInfo("t", (700, 3 * block_size), kind, 0, rows.size)
    with ThreadPoolExecutor(2) as threads, np.errstate(all="ignore"):
        read = dequantize(rows, info, torch.bfloat16, threads)
        exact = dequantize(rows, info)
    assert torch.equal(read.nan_to_num(), exact.bfloat16().nan_to_num())
    assert torch.equal(read.isnan(), exact.isnan())


def test_numbers_are_unpacked_where_they_belong(tmp_path: Path) -> None:
    """If the place has the shape and the dtype; a plain tensor stays the file's."""
    checkpoint = _checkpoint(tmp_path, quantization=Quantization.Q8_0)
    name, other, norm = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
    places = {name: torch.zeros(96, 64), other: torch.zeros(64, 96), norm: torch.zeros(64)}
    read = dict(checkpoint.tensors(torch.float32, places))
    assert read[name] is places[name]
    assert torch.equal(read[name], dict(checkpoint.tensors(torch.float32))[name])
    assert not places[other].any() and not places[norm].any()
    assert read[name].data_ptr() != dict(checkpoint.tensors(torch.bfloat16, places))[name].data_ptr()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_keeps_neither_file_nor_numbers_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the file's 75 MB few are resident at a time, and of 270 MB of numbers what the allocator has kept at hand,
    which grows with the threads that unpack; so they are four on every machine."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    shape, kind = (4096, 1024), Quantization.Q4_K
    rows = np.zeros((shape[0], shape[1] // 256 * 144), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in metadata("llama", embedding_length=1024).items():
        writer.add_float32(key, value) if isinstance(value, float) else writer.add_uint32(key, value)
    for name in ("token_embd.weight", *(f"blk.{layer}.ffn_up.weight" for layer in range(31))):
        writer.add_tensor(name, rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    before = _resident()
    taken = [_resident() - before for _ in checkpoint.tensors(torch.bfloat16)]
    of_files, of_numbers = np.max(taken, axis=0)
    assert of_files < 25e6 and of_numbers < 135e6


def _resident() -> np.ndarray:
    """Bytes of files, and those that are in none."""
    _, resident, of_files = map(int, Path("/proc/self/statm").read_text().split()[:3])
    return np.array([of_files, resident - of_files]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "tokens, keys, ends",
    [
        (["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"], {"eos_token_id": 0}, [0, 1, 2]),
        (["<|endoftext|>", "<|im_end|>"], {"eos_token_id": 0}, [0, 1]),
        (["<|endoftext|>", "<|im_end|>"], {"eos_token_id": 1}, 1),
        (["<eos>", "<end_of_turn>", "</s>"], {"eos_token_id": 0}, [0, 1]),  # </s> is a tag of HTML there
        (["<|return|>", "<|end|>", "<|call|>"], {"eos_token_id": 0}, [0, 2]),
        (["a", "</s>"], {}, 1),
        (["a", "b"], {"eos_token_id": 0, "eot_token_id": 1}, [0, 1]),
    ],
)
def test_ends_of_turns_are_known_by_their_names(
    tmp_path: Path, tokens: list[str], keys: dict[str, int], ends: Any
) -> None:
    named = {"model": "gpt2", "tokens": tokens, "token_type": [3] * len(tokens), **keys}
    checkpoint = _checkpoint(tmp_path, keys={f"tokenizer.ggml.{key}": value for key, value in named.items()})
    assert checkpoint.generation_config["eos_token_id"] == ends
