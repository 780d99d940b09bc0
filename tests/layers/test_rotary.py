"""Each accepted RoPE type equals Hugging Face's, beyond the original length too; any other is refused by name."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.models.registry import read_model_config
from tests.tiny_models import (
    edit_json,
    hugging_face_greedy,
    hugging_face_logits,
    load_hugging_face,
    random_prompts,
    record_logits,
    save_random,
)

ORIGINAL = 64
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
# name: (rope parameters, max_position_embeddings of the config)
TYPES: dict[str, tuple[dict[str, Any], int]] = {
    "default": ({"rope_type": "default"}, 256),
    "default-theta": ({"rope_type": "default", "rope_theta": 500.0}, 256),
    "linear": ({"rope_type": "linear", "factor": 4.0}, ORIGINAL),
    "linear-below-1": ({"rope_type": "linear", "factor": 0.5}, 256),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, ORIGINAL),
    "llama3": (LLAMA3, 256),
    "llama3-theta": ({**LLAMA3, "rope_theta": 500000.0}, 256),
    "llama3-other-band": ({**LLAMA3, "low_freq_factor": 0.5, "high_freq_factor": 16.0}, 256),
    "yarn": (YARN, 256),
    "yarn-original-from-config": ({"rope_type": "yarn", "factor": 4.0}, ORIGINAL),
    "yarn-attention-factor": ({**YARN, "attention_factor": 1.7}, 256),
    "yarn-mscale": ({**YARN, "mscale": 0.707, "mscale_all_dim": 1.3}, 256),
    "yarn-beta": ({**YARN, "beta_fast": 16.0, "beta_slow": 2.0}, 256),
    "yarn-not-truncated": ({**YARN, "truncate": False}, 256),
    "yarn-factor-1": ({**YARN, "factor": 1.0}, ORIGINAL),
}


def hugging_face_config(rope: dict[str, Any], max_position_embeddings: int, head_dim: int = 16) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )


def ours(hf_config: Any) -> Any:
    return read_model_config({**hf_config.to_dict(), "architectures": ["LlamaForCausalLM"]}, "float32")


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
@pytest.mark.parametrize("name", TYPES)
def test_cosines_and_sines_equal_hugging_face(name: str, head_dim: int) -> None:
    """The layer beside Hugging Face's layer, over four times the original length."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf_config = hugging_face_config(*TYPES[name], head_dim)
    config = ours(hf_config)
    length = config.max_model_len
    positions = torch.arange(length)
    cos, sin = LlamaRotaryEmbedding(hf_config)(torch.zeros(1), positions[None])
    rope_lens = torch.full((length,), length) if config.ropes[0].rope_type == "dynamic" else None
    cos_sin = RotaryEmbedding(head_dim, length, config.ropes[0])(positions, rope_lens)
    half = head_dim // 2
    expected = torch.cat((cos[0, :, :half], sin[0, :, :half]), -1)
    torch.testing.assert_close(cos_sin, expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", ["linear", "dynamic", "llama3", "yarn"])
def test_frequencies_equal_the_functions_of_transformers(name: str) -> None:
    """Read off the angles at position 1, for three original lengths."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for length in (16, 256, 8192):
        rope = {
            **TYPES[name][0],
            **({"original_max_position_embeddings": length} if name in ("yarn", "llama3") else {}),
        }
        hf_config = hugging_face_config(rope, length, 64)
        inv_freq, scale = ROPE_INIT_FUNCTIONS[name](hf_config, torch.device("cpu"), seq_len=3 * length)
        rope_lens = torch.tensor([3 * length]) if name == "dynamic" else None
        cos_sin = RotaryEmbedding(64, 4, ours(hf_config).ropes[0])(torch.tensor([1]), rope_lens)[0]
        expected = torch.cat((inv_freq.cos(), inv_freq.sin())) * scale
        torch.testing.assert_close(cos_sin, expected, atol=1e-6, rtol=0)


def test_dynamic_counts_from_max_position_embeddings_as_hugging_face_does() -> None:
    """`original_max_position_embeddings` beside it changes nothing there."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 2 * ORIGINAL}
    assert ours(hugging_face_config(rope, ORIGINAL)).ropes == ours(hugging_face_config(*TYPES["dynamic"])).ropes


def test_dynamic_before_the_original_length_is_the_default() -> None:
    config = ours(hugging_face_config(*TYPES["dynamic"]))
    positions = torch.arange(ORIGINAL)
    layer = RotaryEmbedding(16, config.max_model_len, config.ropes[0])
    plain = RotaryEmbedding(16, ORIGINAL, ours(hugging_face_config(*TYPES["default"])).ropes[0])
    torch.testing.assert_close(layer(positions, positions + 1), plain(positions), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [name for name in TYPES if "default" not in name and name != "linear-below-1"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_whole_models_equal_hugging_face_beyond_the_original_length(
    tmp_path: Path, name: str, architecture: str
) -> None:
    """Logits of a prompt of twice the original length and of the output after it."""
    rope, max_positions = TYPES[name]
    folder = save_random(
        tmp_path,
        architecture,
        max_position_embeddings=max_positions,
        head_dim=16,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )
    prompt = random_prompts([2 * ORIGINAL if name != "yarn-factor-1" else ORIGINAL // 2])[0]
    with LLM(str(folder), device="cpu", dtype="float32", skip_tokenizer_init=True, max_num_seqs=1) as llm:
        logits = record_logits(llm)
        (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
    hugging_face = load_hugging_face(folder)
    tokens = output.outputs[0].token_ids
    # With a cache, as the dynamic type's keys of the prompt keep the frequencies they were computed with.
    assert tokens == hugging_face_greedy(hugging_face, prompt, 6)
    num_compared = len(prompt) if name == "dynamic" else len(prompt) + 5
    expected = hugging_face_logits(load_hugging_face(folder), (prompt + tokens)[:num_compared])
    torch.testing.assert_close(logits()[:num_compared], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 4, "max_num_batched_tokens": 13}, {"overlap_depth": 2}])
@pytest.mark.parametrize("preempts", [False, True])
def test_dynamic_through_the_engine(tmp_path: Path, options: dict[str, Any], preempts: bool) -> None:
    """Whole or chunked, preempted, and with a warm prefix cache, where prompts of other lengths share text.

    Keys depend on the prompt's length once that is past the original one, so those blocks must not be shared; outputs
    that grow past it, and prompts below it, must come out right as well.
    """
    folder = save_random(
        tmp_path,
        max_position_embeddings=ORIGINAL,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0},
    )
    shared = random_prompts([120])[0]
    prompts = [shared[:length] for length in (120, 100, 100, 80, 64, 60, 40)]
    hugging_face = load_hugging_face(folder)
    expected = []
    for prompt in prompts:
        hugging_face_logits(hugging_face, [0])  # a short input makes Hugging Face forget the length of the last one
        expected.append(hugging_face_greedy(hugging_face, prompt, 20))
    if preempts:
        options = {**options, "num_gpu_blocks_override": 18}
    with LLM(str(folder), device="cpu", dtype="float32", skip_tokenizer_init=True, block_size=8, **options) as llm:
        for _ in ("cold", "warm"):
            outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == expected
        # What one request wrote as output past the original length is another's prompt.
        longer = prompts[5] + expected[5]
        hugging_face_logits(hugging_face, [0])
        follow_up = llm.generate([longer], SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
        assert follow_up[0].outputs[0].token_ids == hugging_face_greedy(hugging_face, longer, 5)
        metrics = llm.get_metrics()
    assert metrics["num_prompt_tokens_cached"] > 0
    assert (metrics["num_preemptions"] > 0) == preempts


@pytest.mark.parametrize("rope_type", ["mrope", "su", "ntk"])
def test_any_other_type_is_refused_by_name(rope_type: str) -> None:
    config = {**hugging_face_config(*TYPES["default"]).to_dict(), "architectures": ["LlamaForCausalLM"]}
    for key in ("rope_type", "type"):
        for owner in ("rope_parameters", "rope_scaling"):
            hf = {name: value for name, value in config.items() if name != "rope_parameters"}
            hf[owner] = {key: rope_type, "factor": 2.0}
            with pytest.raises(ValueError, match=f"rope_type '{rope_type}'"):
                read_model_config(hf, "float32")


def test_an_unsupported_type_is_refused_by_llm(tmp_path: Path) -> None:
    folder = save_random(tmp_path)
    edit_json(folder / "config.json", rope_parameters={"rope_type": "ntk", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ValueError, match="rope_type 'ntk'"):
        LLM(str(folder), device="cpu", skip_tokenizer_init=True)


@pytest.mark.parametrize("name", ["linear", "dynamic", "llama3", "yarn"])
def test_a_missing_parameter_is_named(name: str) -> None:
    rope, length = TYPES[name]
    config = {**hugging_face_config(rope, length).to_dict(), "architectures": ["LlamaForCausalLM"]}
    for parameter in rope:
        if parameter == "rope_type" or (name == "yarn" and parameter == "original_max_position_embeddings"):
            continue
        for change in ({}, {parameter: None}):
            left = {key: value for key, value in config["rope_parameters"].items() if key != parameter}
            with pytest.raises(ValueError, match=parameter):
                read_model_config({**config, "rope_parameters": {**left, **change}}, "float32")


def test_partial_rotation_is_refused() -> None:
    config = {**hugging_face_config(*TYPES["default"]).to_dict(), "architectures": ["LlamaForCausalLM"]}
    for change in (
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ):
        with pytest.raises(ValueError, match="partial_rotary_factor"):
            read_model_config({**config, **change}, "float32")


def test_the_older_spelling_means_the_same() -> None:
    """rope_theta and rope_scaling with `type`, as config.json files before transformers 5 have them."""
    for name in ("default-theta", "linear", "dynamic", "llama3-theta", "yarn-beta"):
        hf_config = hugging_face_config(*TYPES[name])
        new = hf_config.to_dict()
        old = {key: value for key, value in new.items() if key != "rope_parameters"}
        scaling = {
            key: value for key, value in new["rope_parameters"].items() if key not in ("rope_theta", "rope_type")
        }
        old["rope_theta"] = new["rope_parameters"]["rope_theta"]
        old["rope_scaling"] = {"type": new["rope_parameters"]["rope_type"], **scaling} if scaling else None
        assert read_model_config({**old, "architectures": ["LlamaForCausalLM"]}, "float32") == ours(hf_config)


# -- longrope, and partial rotation --

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [2.0, 3.0, 5.0, 8.0],
    "original_max_position_embeddings": ORIGINAL,
}
PHI = {
    "hidden_size": 64,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": ORIGINAL,
    "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.5},  # of a head of 16
}


@pytest.mark.parametrize("changes", [{}, {"attention_factor": 1.3}, {"factor": 7.0}])
@pytest.mark.parametrize("length", [ORIGINAL, ORIGINAL + 1, 200])
def test_longrope_cosines_and_sines_equal_hugging_face(changes: dict[str, Any], length: int) -> None:
    """One set of frequencies up to the original length, another for all positions of longer contexts."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf_config = hugging_face_config({**LONGROPE, **changes}, 256, head_dim=8)
    cos, sin = LlamaRotaryEmbedding(hf_config)(torch.zeros(1), torch.arange(length)[None])
    layer = RotaryEmbedding(8, 256, ours(hf_config).ropes[0])
    expected = torch.cat((cos[0, :, :4], sin[0, :, :4]), -1)
    positions = torch.arange(length)
    torch.testing.assert_close(layer(positions, torch.full((length,), length)), expected, atol=3e-5, rtol=0)
    torch.testing.assert_close(layer(positions[-1:]), expected[-1:], atol=3e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 13, "max_num_seqs": 4}, {"overlap_depth": 2}])
@pytest.mark.parametrize("preempts", [False, True])
def test_longrope_through_the_engine(tmp_path: Path, options: dict[str, Any], preempts: bool) -> None:
    """Prompts on both sides of the original length, and outputs that cross it, for which all keys change.

    Cold and with a warm prefix cache, in which keys of both kinds lie, and as one of two outputs of a prompt.
    """
    folder = save_random(tmp_path, "Phi3ForCausalLM", **PHI)
    shared = random_prompts([120])[0]
    prompts = [shared[:length] for length in (120, 80, 66, 65, 64, 63, 50, 30)]
    hugging_face = load_hugging_face(folder)
    # Without a cache: transformers 5.17 leaves keys in it as they were before the change.
    expected = [hugging_face_greedy(hugging_face, prompt, 24, use_cache=False) for prompt in prompts]
    if preempts:
        options = {**options, "num_gpu_blocks_override": 22}
    params = SamplingParams(temperature=0, max_tokens=24)
    with LLM(str(folder), device="cpu", dtype="float32", skip_tokenizer_init=True, block_size=8, **options) as llm:
        for _ in ("cold", "warm"):
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == expected
        twice = SamplingParams(temperature=1, top_k=1, max_tokens=24, n=2)
        (pair,) = llm.generate([prompts[6]], twice, use_tqdm=False)
        assert [output.token_ids for output in pair.outputs] == [expected[6]] * 2
        logits = record_logits(llm)
        llm.generate([prompts[0]], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        assert llm.get_metrics()["num_prompt_tokens_cached"] > 0
    last = hugging_face_logits(hugging_face, prompts[0])[-len(logits()) :]
    torch.testing.assert_close(logits(), last, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["short_factor", "long_factor"])
@pytest.mark.parametrize("value", [None, 2.0, [1.0, 2.0]])
def test_longrope_needs_a_factor_for_each_frequency(name: str, value: Any) -> None:
    config = {**hugging_face_config(LONGROPE, 256, 8).to_dict(), "architectures": ["LlamaForCausalLM"]}
    with pytest.raises(ValueError, match=f"needs '{name}'|{name} must be a list of 4 numbers"):
        read_model_config({**config, "rope_parameters": {**LONGROPE, name: value}}, "float32")


def test_the_first_names_of_longrope_and_its_place_in_older_configs() -> None:
    """As Phi-3's config.json files had it."""
    from transformers import Phi3Config

    hf = Phi3Config(**PHI, num_attention_heads=4).to_dict()
    hf["architectures"] = ["Phi3ForCausalLM"]
    parameters = hf.pop("rope_parameters")
    expected = read_model_config({**hf, "rope_parameters": parameters}, "float32").ropes
    scaling = {name: parameters[name] for name in ("short_factor", "long_factor")}
    for name in ("su", "yarn", "longrope"):
        old = {**hf, "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_scaling": {"type": name, **scaling}}
        assert read_model_config(old, "float32").ropes == expected


def test_a_rope_parameter_that_nobody_knows_is_refused() -> None:
    config = {**hugging_face_config(*TYPES["linear"]).to_dict(), "architectures": ["LlamaForCausalLM"]}
    parameters = {**config["rope_parameters"], "mrope_section": [1, 2, 3]}
    with pytest.raises(ValueError, match="mrope_section"):
        read_model_config({**config, "rope_parameters": parameters}, "float32")


def test_gemma_3_has_two_ropes_in_both_spellings() -> None:
    """The layers with a window have a base of their own and are never stretched."""
    from transformers import Gemma3TextConfig

    hf_config = Gemma3TextConfig(num_hidden_layers=7, rope_scaling={"rope_type": "linear", "factor": 8.0})
    new = {**hf_config.to_dict(), "architectures": ["Gemma3ForCausalLM"]}
    old = {name: value for name, value in new.items() if name not in ("rope_parameters", "layer_types")}
    old |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
    old["rope_scaling"] = {"type": "linear", "factor": 8.0}
    ropes = read_model_config(new, "float32").ropes
    assert [(rope.rope_type, rope.theta) for rope in ropes if rope] == [
        *[("default", 1e4)] * 5, ("linear", 1e6), ("default", 1e4)
    ]  # fmt: skip
    assert read_model_config(old, "float32").ropes == ropes
    del old["rope_local_base_freq"], old["rope_theta"]  # both are defaults
    config = read_model_config(old, "float32")
    assert (config.ropes, config.windows) == (ropes, read_model_config(new, "float32").windows)


def test_a_model_without_memory_is_made_without_torchs_compiler() -> None:
    """Sizes are checked on the meta device before weights are read; arithmetic there imports seconds of torch."""
    program = (
        "import sys, torch\n"
        "from nanovllm.model_config import RopeConfig\n"
        "from nanovllm.layers.rotary import RotaryEmbedding\n"
        "with torch.device('meta'):\n"
        "    rotary = RotaryEmbedding(8, 32, RopeConfig())\n"
        "assert rotary.table.shape == (32, 8), rotary.table.shape\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
