"""config.json files as released models of `dense_families.py` have them, and values that cannot be run."""

from typing import Any

import pytest

from nanovllm.models.registry import read_model_config
from tests.models.test_hf_config import read


def test_what_layers_with_windows_rotate() -> None:
    pattern = (4096, 4096, 4096, None) * 2
    olmo = read(
        "Olmo3ForCausalLM", layer_types=["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 4,
        sliding_window=4096, rope_theta=500000, attention_bias=False, rope_scaling={"rope_type": "yarn", "factor": 8.0,
        "attention_factor": 1.2, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 8192},
    )  # fmt: skip
    assert [rope.rope_type for rope in olmo.ropes] == ["default"] * 3 + ["yarn"] + ["default"] * 4
    assert {rope.theta for rope in olmo.ropes} == {5e5}
    exaone = read(
        "Exaone4ForCausalLM", sliding_window=4096, sliding_window_pattern="LLLG", rope_theta=1e6, head_dim=128,
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 2,
    )  # fmt: skip
    cohere = read(
        "Cohere2ForCausalLM", sliding_window=4096, sliding_window_pattern=4, logit_scale=0.25, rope_theta=50000,
        order_of_interleaved_layers="local_attn_first", position_embedding_type="rope_gptj", rotary_pct=1.0,
        use_embedding_sharing=True, use_gated_activation=True, use_parallel_block=True, use_parallel_embedding=False,
        layer_norm_eps=1e-5, cache_implementation="hybrid",
    )  # fmt: skip
    for config in (exaone, cohere):
        assert config.windows == pattern
        assert [rope is None for rope in config.ropes] == [False, False, False, True] * 2
    assert (cohere.logits_scale, cohere.norms, cohere.is_neox_style) == (0.25, "shared", False)
    small = read(
        "Exaone4ForCausalLM", sliding_window=None, sliding_window_pattern=None, layer_types=["full_attention"] * 8
    )
    assert small.windows == (None,) * 8 and None not in small.ropes


def test_fields_that_change_nothing() -> None:
    hunyuan = read(
        "HunYuanDenseV1ForCausalLM", head_dim=128, rope_theta=10000.0, use_qk_norm=True, use_cla=False, norm_type="rms",
        rope_scaling={"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
        "mscale_all_dim": 1.0, "type": "dynamic"}, attention_head_dim=128, eod_token_id=3, pool_type="last",
    )  # fmt: skip
    assert hunyuan.ropes[0].rope_type == "default" and hunyuan.ropes[0].theta == 1e4 * 1000 ** (128 / 126)
    granite = read(
        "GraniteMoeHybridForCausalLM", num_local_experts=0, num_experts_per_tok=0, layer_types=["attention"] * 8,
        position_embedding_type="rope", shared_intermediate_size=768, attention_multiplier=0.015625,
        embedding_multiplier=12, logits_scaling=10, residual_multiplier=0.22, normalization_function="rmsnorm",
        init_method="mup", mamba_d_head=32, mamba_n_heads=16, mamba_expand=2, mamba_conv_bias=True, rope_theta=1e7,
        output_router_logits=False, router_aux_loss_coef=0.01,
    )  # fmt: skip
    assert (granite.intermediate_size, granite.attention_scale, granite.ropes[0].theta) == (768, 0.015625, 1e7)
    starcoder = read(
        "Starcoder2ForCausalLM", norm_epsilon=1e-5, norm_type="layer_norm", mlp_type="default", sliding_window=4096,
        residual_dropout=0.1, embedding_dropout=0.1, layer_norm_epsilon=1e-5, scale_attn_weights=True, use_bias=True,
        hidden_act="gelu_pytorch_tanh", attention_softmax_in_fp32=True, scale_attention_softmax_in_fp32=True,
    )  # fmt: skip
    assert starcoder.qkv_bias and starcoder.o_bias and starcoder.mlp_bias and starcoder.activation == "gelu_tanh"
    assert (
        read("ApertusForCausalLM", qk_norm=True, mlp_bias=False, post_norm=False, hidden_act="xielu").ropes[0].theta
        == 1.2e7
    )
    glm = read("Glm4ForCausalLM", partial_rotary_factor=0.5, rope_theta=10000.0, attention_bias=True)
    assert (glm.qkv_bias, glm.o_bias, glm.ropes[0].share, glm.head_dim) == (True, False, 0.5, 128)


@pytest.mark.parametrize(
    ("architecture", "name", "value"),
    [
        ("Exaone4ForCausalLM", "sliding_window_pattern", "LLLG"),  # without layer_types; transformers cannot, either
        ("ArceeForCausalLM", "hidden_act", "gelu"),
        ("ApertusForCausalLM", "hidden_act", "silu"),
        ("Starcoder2ForCausalLM", "norm_epsilon", -1),
        ("Starcoder2ForCausalLM", "use_bias", "yes"),
        ("Cohere2ForCausalLM", "logit_scale", 0),
        ("CohereForCausalLM", "use_qk_norm", True),
        ("Ministral3ForCausalLM", "rope_parameters", {"rope_type": "default", "rope_theta": 1e4}),
        ("LlamaForCausalLM", "rope_scaling", {"type": "dynamic", "factor": 2.0, "alpha": 1000.0}),
    ],
)
def test_values_that_would_be_run_wrongly_are_refused_by_name(architecture: str, name: str, value: Any) -> None:
    shown = {"rope_parameters": "llama_4_scaling_beta", "rope_scaling": "alpha"}.get(name, name)
    with pytest.raises(ValueError, match=shown):
        read(architecture, **{name: value})


def test_which_text_model_is_in_a_whole() -> None:
    fields = {"architectures": ["Mistral3ForConditionalGeneration"], "vocab_size": 8, "hidden_size": 8, "head_dim": 8}
    sizes = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    rope = {"rope_type": "yarn", "type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384}  # fmt: skip
    scaled = {**rope, "llama_4_scaling_beta": 0.1}
    config = read_model_config({**fields, **sizes, "model_type": "ministral3", "rope_parameters": scaled}, "bfloat16")
    assert (config.architecture, config.max_model_len) == ("Ministral3ForCausalLM", 262144)
    with pytest.raises(ValueError, match="llama_4_scaling_beta"):
        read_model_config({**fields, **sizes, "model_type": "mistral", "rope_parameters": scaled}, "bfloat16")
