"""EngineConfig and ModelConfig: what is accepted, what is refused by name, how None is decided."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import EngineConfig, SamplingParams, vllm_options
from nanovllm.config import ResolvedConfig
from nanovllm.model_config import ModelConfig, RopeConfig
from nanovllm.models.registry import read_model_config

HF: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1000,
    "rms_norm_eps": 1e-5,
}
POSITIVE_INTEGERS = [
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_cache_memory_bytes",
    "num_gpu_blocks_override",
    "overlap_depth",
    "tensor_parallel_size",
]
MISSPELT = {
    "max_model_length": "max_model_len",
    "max_seqs": "max_num_seqs",
    "gpu_memory_utilisation": "gpu_memory_utilization",
    "enable_prefix_cache": "enable_prefix_caching",
    "tensor_parallel": "tensor_parallel_size",
    "enforce_eagre": "enforce_eager",
    "blocksize": "block_size",
    "d_type": "dtype",
    "skip_tokenizer": "skip_tokenizer_init",
}


def model_config(**changes: Any) -> ModelConfig:
    return read_model_config({**HF, **changes}, "float32")


# -- EngineConfig --


@pytest.mark.parametrize("misspelt", MISSPELT)
def test_a_misspelt_option_names_the_nearest_right_one(misspelt: str) -> None:
    with pytest.raises(TypeError, match=f"{misspelt!r}.*{MISSPELT[misspelt]!r}"):
        EngineConfig(model="m", **{misspelt: 1})


@pytest.mark.parametrize("name", ["reasoning_mode", "enable_thinking", "response_format"])
def test_another_thing_gets_no_option_of_similar_letters(name: str) -> None:
    with pytest.raises(TypeError, match=f"no option {name!r}: options are: model, "):
        EngineConfig(model="m", **{name: 1})


VLLM_OPTIONS: list[tuple[str, list[Any], Any, str]] = [  # (option, what asks for nothing, what asks, what is missing)
    ("trust_remote_code", [None, False], True, "remote code is never run"),
    ("fully_sharded_loras", [None, False], True, "each matrix is split as its layer is"),
    ("swap_space", [None, 0], 16, "nothing is swapped"),
    ("cpu_offload_gb", [None, 0, 0.0], 4, "weights are not offloaded"),
    ("tokenizer_mode", ["auto"], "mistral", "one kind of tokenizer"),
    ("pipeline_parallel_size", [1], 2, "use tensor_parallel_size"),
    ("limit_mm_per_prompt", [None, {}], {"image": 1}, "only text"),
    ("disable_log_stats", [True], False, r"get_metrics\(\)"),
]


@pytest.mark.parametrize(("name", "nothing", "value", "missing"), VLLM_OPTIONS, ids=str)
def test_an_option_of_vllm_that_is_not_here(name: str, nothing: list[Any], value: Any, missing: str) -> None:
    """Taken where it asks for nothing, else refused by what it asks for, and not by letters like another's."""
    for off in nothing:
        assert EngineConfig(model="m", **{name: off}) == EngineConfig(model="m")
    with pytest.raises(TypeError, match=rf"{name}=.* is not supported: .*{missing}") as error:
        EngineConfig(model="m", **{name: value})
    assert "did you mean" not in str(error.value)


def test_how_of_an_option_that_is_off_is_taken() -> None:
    assert EngineConfig(model="m", enable_lora=False, lora_dtype="auto", max_lora_rank=16) == EngineConfig(model="m")


def test_every_option_of_vllm_that_is_not_here_is_really_not_here() -> None:
    """What has come since is in the class, and out of the table."""
    for owner in (EngineConfig, SamplingParams):
        names = {field.name for field in dataclasses.fields(owner)}
        assert not names & set(vllm_options._ABSENT[owner.__name__])


@pytest.mark.parametrize("name", POSITIVE_INTEGERS)
def test_counts_are_positive_integers(name: str) -> None:
    for value in (0, -2):
        with pytest.raises(ValueError, match=name):
            EngineConfig(model="m", **{name: value})
    for value in (1.0, "1", True):
        with pytest.raises(TypeError, match=name):
            EngineConfig(model="m", **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", ""),
        ("model", None),
        ("model", 3),
        ("dtype", "float64"),
        ("load_format", "pt"),
        ("compilation", True),
        ("block_size", 7),
        ("block_size", 128),
        ("gpu_memory_utilization", 0),
        ("gpu_memory_utilization", 1.01),
        ("gpu_memory_utilization", float("nan")),
        ("gpu_memory_utilization", -0.5),
        ("tensor_parallel_size", 0),
        ("distributed_executor_backend", "ray"),
        ("distributed_timeout_seconds", 0),
        ("distributed_timeout_seconds", "1"),
    ],
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        EngineConfig(**{"model": "m", name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enable_prefix_caching", 1),
        ("enforce_eager", None),
        ("dependent_launch", 1),
        ("disable_custom_all_reduce", "no"),
        ("skip_tokenizer_init", "yes"),
        ("seed", 1.5),
        ("seed", True),
        ("gpu_memory_utilization", "0.9"),
        ("gpu_memory_utilization", True),
        ("device", None),
        ("tokenizer", 3),
        ("revision", 3),
    ],
)
def test_wrong_types_are_named(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        EngineConfig(**{"model": "m", name: value})


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("model", Path("folder/model"), "folder/model"),
        ("tokenizer", Path("folder"), "folder"),
        ("dtype", "half", "float16"),
        ("dtype", "float", "float32"),
        ("dtype", torch.bfloat16, "bfloat16"),
        ("device", torch.device("cuda", 1), "cuda:1"),
        ("seed", None, 0),
        ("seed", np.int64(7), 7),
        ("max_model_len", -1, None),
        ("max_num_seqs", np.int32(5), 5),
        ("gpu_memory_utilization", np.float32(0.5), 0.5),
        ("block_size", np.int64(16), 16),
    ],
)
def test_other_forms_of_a_value_are_understood(name: str, value: Any, meant: Any) -> None:
    found = getattr(EngineConfig(**{"model": "m", name: value}), name)
    assert found == meant and type(found) is type(meant)


def test_a_budget_below_one_token_for_each_request_is_refused() -> None:
    """Every running request gets a token in every step."""
    with pytest.raises(ValueError, match=r"max_num_batched_tokens \(7\).*max_num_seqs \(8\)"):
        EngineConfig(model="m", max_num_seqs=8, max_num_batched_tokens=7)
    EngineConfig(model="m", max_num_seqs=8, max_num_batched_tokens=8)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "given", [{}, {"max_num_seqs": 5000}, {"max_num_batched_tokens": 3}, {"max_num_seqs": 1, "max_model_len": 5}]
)
def test_resolve_decides_everything_and_keeps_what_was_given(device_type: str, given: dict[str, int]) -> None:
    config = EngineConfig(model="m", **given)
    resolved = config.resolve(model_config(), device_type)
    assert isinstance(resolved, ResolvedConfig)
    # None is an answer there
    absent = {"tokenizer", "revision", "quantization", "kv_cache_memory_bytes", "num_gpu_blocks_override"}
    absent |= {"speculative_config", "trace", "prefix_store"}
    for field in dataclasses.fields(resolved):
        assert field.name in absent or getattr(resolved, field.name) is not None
    with pytest.raises(TypeError, match="max_model_len"):
        dataclasses.replace(resolved, max_model_len=None)
    for name, value in given.items():
        assert getattr(resolved, name) == value
    assert resolved.max_num_batched_tokens >= resolved.max_num_seqs
    assert resolved.max_model_len == given.get("max_model_len", 1000)
    assert resolved.resolve(model_config(), device_type) == resolved
    assert config == EngineConfig(model="m", **given)


def test_a_length_beyond_the_model_is_refused_with_both_numbers() -> None:
    config = EngineConfig(model="m", max_model_len=1001)
    with pytest.raises(ValueError, match=r"1001.*1000"):
        config.resolve(model_config(), "cpu")
    stretched = model_config(rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert config.resolve(stretched, "cpu").max_model_len == 1001


# -- ModelConfig --


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_act", "gelu"),
        ("quantization_config", "awq"),
        ("partial_rotary_factor", 0.5),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("attention_multiplier", 0.01),
        ("logits_scaling", 8.0),
        ("no_rope_layers", [1, 0, 1]),
        ("sliding_window", 5),
        ("layer_types", ["sliding_attention"] * 3),
        ("clip_qkv", 8.0),
        ("a_field_of_next_year", 1),
    ],
)
def test_a_field_that_changes_the_maths_is_refused_by_name(name: str, value: Any) -> None:
    """Rather than computed as if it were not there."""
    with pytest.raises(ValueError, match=name):
        model_config(**{name: value})
    model_config(**{name: None})


@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
@pytest.mark.parametrize("value", [None, "32", 1.5])
def test_a_missing_or_wrong_size_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        model_config(**{name: value})


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match=r"num_attention_heads 4.*num_key_value_heads 3"):
        model_config(num_key_value_heads=3)


def test_defaults_are_those_of_older_configs() -> None:
    config = model_config(num_key_value_heads=None, head_dim=None)
    assert (config.num_kv_heads, config.head_dim) == (4, 8)
    assert config.ropes == (RopeConfig(rope_type="default", theta=10000.0),) * 3
    assert not config.tie_word_embeddings and config.windows == (None, None, None)


@pytest.mark.parametrize(
    ("architecture", "changes", "windows"),
    [
        ("MistralForCausalLM", {"sliding_window": 5}, (5, 5, 5)),
        ("MistralForCausalLM", {"sliding_window": None}, (None, None, None)),
        ("MistralForCausalLM", {}, (4096, 4096, 4096)),
        ("Qwen2ForCausalLM", {"sliding_window": 5}, (None, None, None)),
        ("Qwen2ForCausalLM", {"sliding_window": 5, "use_sliding_window": False}, (None, None, None)),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2},
            (None, None, 5),
        ),
        ("Qwen3ForCausalLM", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0}, (5, 5, 5)),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 5,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
            (None, 5, None),
        ),
    ],
)
def test_windows_per_layer(architecture: str, changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert model_config(architectures=[architecture], **changes).windows == windows


@pytest.mark.parametrize("layer_types", [["full_attention", "chunked_attention", "full_attention"], ["full_attention"]])
def test_unknown_or_too_few_layer_types_are_refused(layer_types: list[str]) -> None:
    with pytest.raises(ValueError, match=r"layer.type"):
        model_config(architectures=["Qwen3ForCausalLM"], sliding_window=5, layer_types=layer_types)


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("LlamaForCausalLM", {}, (False, False, False, None)),
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}, (True, True, True, None)),
        ("MistralForCausalLM", {}, (False, False, False, None)),
        ("Qwen2ForCausalLM", {}, (True, False, False, None)),
        ("Qwen3ForCausalLM", {}, (False, False, False, "head")),
        ("Qwen3ForCausalLM", {"attention_bias": True}, (True, True, False, "head")),
    ],
)
def test_switches_of_the_architectures(architecture: str, changes: dict[str, Any], expected: tuple[Any, ...]) -> None:
    """(qkv_bias, o_bias, mlp_bias, qk_norm)"""
    config = model_config(architectures=[architecture], **changes)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == expected


def test_bytes_of_a_token_in_the_kv_cache() -> None:
    assert model_config().kv_bytes_per_token("auto") == 3 * 2 * 2 * 8 * 4
    assert dataclasses.replace(model_config(), dtype="bfloat16").kv_bytes_per_token("auto") == 3 * 2 * 2 * 8 * 2
    assert model_config().kv_bytes_per_token("fp8") == 3 * 2 * 2 * (8 + 2)


# -- without assertions --


def test_validation_does_not_depend_on_assertions() -> None:
    """The cases of this file and of test_sampling_params.py hold under `python -O` too."""
    script = """
import runpy, sys
assert False, "assertions are off, or this line would raise"
config, sampling = (runpy.run_path(path) for path in sys.argv[1:])
EngineConfig, SamplingParams = config["EngineConfig"], sampling["SamplingParams"]

def refuses(make, errors, options):
    try:
        make(**options)
    except errors as error:
        if all(name in str(error) for name in options if name != "model"):
            return
    raise SystemExit(f"accepted, or refused without the name: {options}")

for name, value in sampling["WRONG_VALUES"]:
    refuses(SamplingParams, ValueError, {name: value})
for name, value in sampling["WRONG_TYPES"]:
    refuses(SamplingParams, TypeError, {name: value})
for name in [*sampling["MISSPELT"], "best_of", "guided_decoding"]:
    refuses(SamplingParams, TypeError, {name: 1})
for name in config["MISSPELT"]:
    refuses(EngineConfig, TypeError, {"model": "m", name: 1})
for name in config["POSITIVE_INTEGERS"]:
    refuses(EngineConfig, ValueError, {"model": "m", name: 0})
    refuses(EngineConfig, TypeError, {"model": "m", name: 1.5})
"""
    here = Path(__file__).parent
    paths = [str(here / "test_config.py"), str(here / "test_sampling_params.py")]
    result = subprocess.run(
        [sys.executable, "-O", "-c", script, *paths], capture_output=True, text=True, cwd=here.parent, timeout=120
    )
    assert result.returncode == 0, result.stderr + result.stdout


def test_without_chunked_prefill_a_step_holds_the_longest_prompt() -> None:
    config = EngineConfig(model="m", enable_chunked_prefill=False).resolve(model_config(), "cpu")
    assert config.max_num_batched_tokens >= config.max_model_len
    config = EngineConfig(model="m", enable_chunked_prefill=False, max_num_batched_tokens=64, max_model_len=64)
    assert config.resolve(model_config(), "cpu").max_num_batched_tokens == 64
    config = EngineConfig(model="m", enable_chunked_prefill=False, max_num_batched_tokens=63, max_model_len=64)
    with pytest.raises(ValueError, match=r"max_num_batched_tokens \(63\) must be at least max_model_len \(64\)"):
        config.resolve(model_config(), "cpu")
