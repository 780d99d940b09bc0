"""config.json files with the fields that released models have, as old and new versions of transformers wrote them."""

import copy
from typing import Any

import pytest

from nanovllm.model_config import RopeConfig
from nanovllm.models.hf_config import read_eos_token_ids
from nanovllm.models.registry import read_model_config

SIZES = {
    **{"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192},
    **{"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0, "initializer_range": 0.02, "use_cache": True},
    **{"torch_dtype": "bfloat16", "transformers_version": "4.50.0", "attention_dropout": 0.0, "rms_norm_eps": 1e-5},
}


def read(architecture: str, **fields: Any) -> Any:
    return read_model_config({"architectures": [architecture], **SIZES, **fields}, "bfloat16")


def test_llama_3() -> None:
    scaling = {
        **{"rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0},
        "original_max_position_embeddings": 8192,
    }
    config = read(
        "LlamaForCausalLM", attention_bias=False, mlp_bias=False, head_dim=64, hidden_act="silu", model_type="llama",
        pretraining_tp=1, rope_scaling=scaling, rope_theta=500000.0, tie_word_embeddings=True,
    )  # fmt: skip
    assert config.ropes[0].theta == 500000.0 and config.ropes[0].parameters["factor"] == 32.0
    assert config.attention_scale == 64**-0.5 and config.norms == "before"


def test_smollm_2_and_3() -> None:
    two = read("LlamaForCausalLM", is_llama_config=True, rope_interleaved=False, **{"transformers.js_config": {}})
    assert two.ropes == (RopeConfig(),) * 8
    three = read(
        "SmolLM3ForCausalLM", no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 2, max_window_layers=28,
        use_sliding_window=False, sliding_window=None, layer_types=["full_attention"] * 8, rope_theta=5000000.0,
        pretraining_tp=2, rope_scaling=None, mlp_bias=False, attention_bias=False,
    )  # fmt: skip
    assert [rope is None for rope in three.ropes] == [False, False, False, True] * 2
    assert three.windows == (None,) * 8 and three.tie_word_embeddings


@pytest.mark.parametrize("layer_types", [None, ["sliding_attention", "full_attention"] * 4])
def test_gemma_2(layer_types: list[str] | None) -> None:
    config = read(
        "Gemma2ForCausalLM", attn_logit_softcapping=50.0, final_logit_softcapping=30.0, cache_implementation="hybrid",
        head_dim=256, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", sliding_window=4096,
        query_pre_attn_scalar=224, rope_theta=10000.0, layer_types=layer_types,
    )  # fmt: skip
    assert config.windows == (4096, None) * 4
    assert (config.attention_softcap, config.logits_softcap, config.attention_scale) == (50.0, 30.0, 224**-0.5)
    assert (config.embedding_scale, config.norms, config.activation) == (16.0, "both", "gelu_tanh")


def test_gemma_3() -> None:
    config = read(
        "Gemma3ForCausalLM", attn_logit_softcapping=None, final_logit_softcapping=None, _sliding_window_pattern=6,
        hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, rope_local_base_freq=10000, head_dim=256,
        rope_scaling=None, rope_theta=1000000, sliding_window=512, use_bidirectional_attention=False,
    )  # fmt: skip
    assert config.windows == (512,) * 5 + (None,) + (512,) * 2
    assert [rope.theta for rope in config.ropes] == [1e4] * 5 + [1e6] + [1e4] * 2


def test_phi_4_mini() -> None:
    factors = {"short_factor": [1.0] * 24, "long_factor": [2.0] * 24}
    config = read(
        "Phi3ForCausalLM", partial_rotary_factor=0.75, rope_scaling={"type": "longrope", **factors}, rope_theta=1e4,
        original_max_position_embeddings=4096, full_attn_mod=1, interpolate_factor=1, lm_head_bias=False,
        mlp_bias=False, attention_bias=False, embd_pdrop=0.0, resid_pdrop=0.0, sliding_window=262144, auto_map={},
        tie_word_embeddings=True,
    )  # fmt: skip
    assert (config.ropes[0].share, config.long_from, config.max_model_len) == (0.75, 4096, 8192)


def test_granite() -> None:
    config = read(
        "GraniteForCausalLM", attention_multiplier=0.0078125, embedding_multiplier=12.0, logits_scaling=16.0,
        residual_multiplier=0.22, rope_scaling=None, rope_theta=5000000.0, mlp_bias=False, attention_bias=False,
    )  # fmt: skip
    scales = config.attention_scale, config.embedding_scale, config.logits_scale, config.residual_scale
    assert scales == (0.0078125, 12.0, 1 / 16, 0.22)


@pytest.mark.parametrize(
    ("architecture", "name", "value"),
    [
        ("Gemma2ForCausalLM", "use_bidirectional_attention", True),
        ("Gemma3ForCausalLM", "attn_logit_softcapping", 50.0),
        ("GraniteForCausalLM", "residual_multiplier", 0),
        ("GraniteForCausalLM", "logits_scaling", "8"),
        ("Gemma2ForCausalLM", "hidden_activation", "gelu"),
        ("SmolLM3ForCausalLM", "no_rope_layers", [1, 0]),
        ("MistralForCausalLM", "layer_types", ["full_attention"] * 8),
        ("Phi3ForCausalLM", "full_attn_mod", 2),
    ],
)
def test_values_that_would_be_run_wrongly_are_refused_by_name(architecture: str, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        read(architecture, **{name: value})


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
SAVED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}


@pytest.mark.filterwarnings("ignore:config.json. rope_scaling takes the place")
@pytest.mark.parametrize(
    ("model_type", "architecture", "fields"),
    [
        ("qwen3", "Qwen3ForCausalLM", {"rope_parameters": SAVED}),
        ("qwen3", "Qwen3ForCausalLM", {"rope_parameters": SAVED, "rope_scaling": YARN}),
        ("qwen3", "Qwen3ForCausalLM", {"rope_parameters": SAVED, "rope_scaling": YARN, "rope_theta": 7e5}),
        ("qwen3", "Qwen3ForCausalLM", {"rope_parameters": SAVED, "rope_scaling": {**YARN, "rope_theta": 3e5}}),
        ("qwen3", "Qwen3ForCausalLM", {"rope_parameters": SAVED, "rope_scaling": {}, "rope_theta": 7e5}),
        ("qwen3", "Qwen3ForCausalLM", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 7e5}),
        ("mixtral", "MixtralForCausalLM", {"rope_parameters": SAVED, "rope_scaling": YARN}),
        (
            "smollm3",
            "SmolLM3ForCausalLM",
            {"rope_parameters": SAVED, "rope_scaling": {"type": "dynamic", "factor": 3.0}},
        ),
        ("gemma3_text", "Gemma3ForCausalLM", {"rope_scaling": YARN, "rope_theta": 7e5, "rope_local_base_freq": 3e3}),
        (
            "gemma3_text",
            "Gemma3ForCausalLM",
            {
                "rope_parameters": {"full_attention": SAVED, "sliding_attention": {"rope_type": "default"}},
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "rope_local_base_freq": 3e3,
            },
        ),
    ],
)
def test_which_rope_field_wins_is_as_in_transformers(
    model_type: str, architecture: str, fields: dict[str, Any]
) -> None:
    import transformers

    theirs = transformers.AutoConfig.for_model(model_type, **copy.deepcopy({**SIZES, **fields})).rope_parameters
    config = read(architecture, **fields)
    by_type = theirs if "full_attention" in theirs else dict.fromkeys(("full_attention", "sliding_attention"), theirs)
    for window, rope in zip(config.windows, config.ropes, strict=True):
        if rope is None:
            continue
        expected = by_type["full_attention" if window is None else "sliding_attention"]
        assert (rope.rope_type, rope.theta) == (expected["rope_type"], expected["rope_theta"])
        if rope.rope_type != "default":
            assert rope.parameters["factor"] == expected["factor"]


def test_theta_that_rope_scaling_drops_is_said() -> None:
    with pytest.warns(UserWarning, match=r"rope_theta=500000\.0; repeat rope_theta in rope_scaling"):
        read("Qwen3ForCausalLM", rope_parameters=SAVED, rope_scaling=YARN)


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("Qwen3MoeForCausalLM", {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}),
        ("Qwen2ForCausalLM", {"qkv_bias": True, "use_qk_norm": False}),
        ("LlamaForCausalLM", {"use_sliding_window": False, "num_nextn_predict_layers": 0, "seq_length": 4096}),
    ],
)
def test_fields_that_say_what_is_done_anyway_are_read(architecture: str, fields: dict[str, Any]) -> None:
    read(architecture, **fields)
    for name, value in fields.items():
        if name != "seq_length":
            with pytest.raises(ValueError, match=name):
                read(architecture, **{name: not value})


NAN, INF, HUGE = float("nan"), float("inf"), 2**40
ROPE = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}
LLAMA3 = {**ROPE, "rope_type": "llama3", "low_freq_factor": 4, "high_freq_factor": 4}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, (0, -1, 2.0, True, "8", [8], HUGE)) for name in ("vocab_size", "hidden_size", "intermediate_size")),
        *((name, (0, -4, True, HUGE)) for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")),
        ("head_dim", (-1, 0, 7, HUGE, {})),
        ("rms_norm_eps", ("64", -1.0, NAN, INF, [64], 10**400)),
        ("rope_theta", (-1, 0, NAN, INF, "x", True)),
        ("max_position_embeddings", (-1, 1.5, True, NAN, HUGE)),
        ("partial_rotary_factor", (0.0, -1, 2.0, "x")),
        ("factor", [{"rope_type": "linear", "factor": factor} for factor in (0, -2, NAN, "2", 1e308)]),
        ("factor", [{**ROPE, "factor": 1e6}, {**LLAMA3}, {"rope_type": "dynamic"}]),
        ("original_max_position_embeddings", [{**ROPE, "original_max_position_embeddings": x} for x in (0, 1, "x")]),
        ("beta_fast", [{**ROPE, "beta_fast": x} for x in (-1, NAN, "x")]),
        ("rope_type", [{"rope_type": x} for x in ("mrope", [], 1)]),
        ("rope_scaling", ("linear", [1])),
        ("tie_word_embeddings", ("false", 3, [])),
        ("attention_bias", ("true", 1)),
        ("hidden_act", (["silu"], 1, "relu")),
        ("architectures", ("LlamaForCausalLM", 1, {"a": 1}, [3])),
    ],
)
def test_impossible_values_are_refused_by_name(name: str, values: Any) -> None:
    for value in values:
        field = "rope_scaling" if isinstance(value, dict) and "rope_type" in value else name
        with pytest.raises(ValueError, match=name):
            read("LlamaForCausalLM", **{field: value})


@pytest.mark.parametrize(
    ("architecture", "name", "values"),
    [
        ("MistralForCausalLM", "sliding_window", (0, -1, "x", 2.5)),
        ("Gemma2ForCausalLM", "sliding_window_pattern", (0, -1, "x")),
        ("Gemma3ForCausalLM", "layer_types", ("full_attention", [1] * 8, ["full_attention"])),
        ("SmolLM3ForCausalLM", "no_rope_layers", (1, [2] * 8, ["x"] * 8)),
        ("SmolLM3ForCausalLM", "no_rope_layer_interval", (0, "x")),
        ("GraniteForCausalLM", "embedding_multiplier", (NAN, INF, -1)),
        ("Phi3ForCausalLM", "original_max_position_embeddings", (0, "x")),
        ("Phi3ForCausalLM", "partial_rotary_factor", (0.0, 2.0, 1e308)),
    ],
)
def test_impossible_values_of_own_fields_are_refused_by_name(architecture: str, name: str, values: Any) -> None:
    factors = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    scaling = {"rope_scaling": {"rope_type": "longrope", **factors}} if architecture == "Phi3ForCausalLM" else {}
    for value in values:
        with pytest.raises(ValueError, match=name):
            read(architecture, **scaling, **{name: value})


@pytest.mark.parametrize("value", [-5, 1000, "x", [2, -1], True, 1.0])
def test_end_of_sequence_outside_the_vocabulary_is_refused(value: Any) -> None:
    assert read_eos_token_ids({"eos_token_id": [2, 3]}, 1000) == [2, 3]
    assert read_eos_token_ids({}, 1000) == []
    with pytest.raises(ValueError, match="eos_token_id"):
        read_eos_token_ids({"eos_token_id": value}, 1000)
