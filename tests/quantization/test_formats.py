"""Each format of quantized checkpoints, against its own library's numbers, and through the engine."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.kernels.quantized_linear import dequantize
from nanovllm.layers.linear_method import LinearSpec
from nanovllm.quantization.quantized_linear import QuantizedLinear
from nanovllm.quantization.scheme import read_scheme
from tests.quantization.checkpoints import save_quantized
from tests.quantization.formats import FORMATS, Format

OUTPUTS, INPUTS = (24, 16), 64


def needs(name: str) -> None:
    if FORMATS[name].config["quant_method"] == "compressed-tensors" or "NVFP4" in name:
        pytest.importorskip("compressed_tensors")


def weights_of(seed: int) -> list[Tensor]:
    """Of two layers that are one product, the second with larger numbers."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(size, INPUTS, generator=generator) for size in OUTPUTS)
    return [first, 5 * second]


def load(form: Format, tensors: list[dict[str, Tensor]], spec: LinearSpec) -> QuantizedLinear:
    method = read_scheme(form.config).method_of("model.layers.0.mlp.up_proj")
    assert method is not None
    layer = method(spec)
    assert isinstance(layer, QuantizedLinear)
    for part, given in enumerate(tensors):
        weight_specs = dict(layer.weights(part))
        names = {weight_specs[name].instead_of or (f"{spec.names[part]}.{name}",) for name in given}
        assert names == {
            (f"{spec.names[part]}.{name}",) for name, weight_spec in weight_specs.items() if not weight_spec.instead_of
        }
        for name, tensor in given.items():
            assert tensor.shape == weight_specs[name].shape and tensor.dtype in weight_specs[name].dtypes
            weight_specs[name].fill(tensor)
    layer.finish()
    return layer


@pytest.mark.parametrize("name", FORMATS)
def test_what_the_tensors_mean_is_what_is_multiplied_by(name: str) -> None:
    """Parts of one product with scales of their own."""
    needs(name)
    form = FORMATS[name]
    tensors, meant = zip(*map(form.make, weights_of(0)), strict=True)
    names = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
    spec = LinearSpec(OUTPUTS, tuple(map(range, OUTPUTS)), INPUTS, range(INPUTS), torch.float32, names)
    layer = load(form, list(tensors), spec)
    order = torch.arange(INPUTS) if layer.order is None else layer.order
    kept = dequantize(layer.weight, torch.float32)
    torch.testing.assert_close(kept, torch.cat(meant)[:, order], rtol=1e-6, atol=1e-7)
    x, bias = torch.randn(5, INPUTS), torch.randn(sum(OUTPUTS))
    product = layer.multiply(x, bias)
    expected = x @ torch.cat(meant).t() + bias
    if form.rounds_inputs:
        assert ((product - expected).norm() / expected.norm()) < 0.05
    else:
        torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_random_weights_are_as_large_as_those_of_a_dense_matrix(name: str) -> None:
    """load_format="dummy": a variance of about 1 / inputs, whatever codes and scales are."""
    needs(name)
    method = read_scheme(FORMATS[name].config).method_of("model.layers.0.mlp.up_proj")
    assert method is not None
    spec = LinearSpec(OUTPUTS, tuple(map(range, OUTPUTS)), INPUTS, range(INPUTS), torch.float32, ("a", "b"))
    layer, generator = method(spec), torch.Generator().manual_seed(0)
    assert isinstance(layer, QuantizedLinear)
    for part in range(len(OUTPUTS)):
        for _, weight_spec in layer.weights(part):
            if not weight_spec.instead_of:
                assert weight_spec.stand_in is not None
                weight_spec.fill(weight_spec.stand_in(generator))
    layer.finish()
    weights = dequantize(layer.weight, torch.float32)
    assert 0.5 < weights.square().mean().sqrt() * INPUTS**0.5 < 2


@pytest.mark.parametrize("name", ["AWQ", "fp8, blocks"])
def test_random_weights_through_the_engine(tmp_path: Path, name: str) -> None:
    """No file of weights is there; the same seed gives the same."""
    folder, _ = save_quantized(tmp_path, FORMATS[name])
    (folder / "model.safetensors").unlink()
    first, again, other = (logprobs(folder, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_hold_their_parts(name: str, rank: int) -> None:
    """Rows of each matrix, or inputs in whole groups; else an error that says so."""
    needs(name)
    form = FORMATS[name]
    tensors, meant = zip(*map(form.make, weights_of(1)), strict=True)
    parts = tuple(range(rank * size // 2, (rank + 1) * size // 2) for size in OUTPUTS)
    by_rows = LinearSpec(OUTPUTS, parts, INPUTS, range(INPUTS), torch.float32, ("a", "b"))
    layer = load(form, list(tensors), by_rows)
    order = torch.arange(INPUTS) if layer.order is None else layer.order
    rows = torch.cat([m[part.start : part.stop] for m, part in zip(meant, parts, strict=True)])
    torch.testing.assert_close(dequantize(layer.weight, torch.float32), rows[:, order], rtol=1e-6, atol=1e-7)
    inputs = range(rank * INPUTS // 2, (rank + 1) * INPUTS // 2)
    by_inputs = LinearSpec(OUTPUTS[:1], (range(OUTPUTS[0]),), INPUTS, inputs, torch.float32, ("a",))
    if "order" in name or "ragged" in name:
        with pytest.raises((NotImplementedError, ValueError), match=r"a: .*tensor.parallel"):
            load(form, list(tensors[:1]), by_inputs)
    else:
        layer = load(form, list(tensors[:1]), by_inputs)
        torch.testing.assert_close(
            dequantize(layer.weight, torch.float32), meant[0][:, inputs.start : inputs.stop], rtol=1e-6, atol=1e-7
        )


def logprobs(folder: Path, **options: Any) -> list[list[float]]:
    with LLM(str(folder), device="cpu", dtype="float32", skip_tokenizer_init=True, **options) as llm:
        assert f"quantization={llm.quantization!r}" in repr(llm)
        assert (llm.quantization is None) == (llm.config.quantization is None and llm.model_config.quantization is None)
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1, prompt_logprobs=0)
        outputs = llm.generate([[1, 2, 3, 4, 5, 6, 7], [9, 8]], params, use_tqdm=False)
    given = []
    for output in outputs:
        assert output.prompt_logprobs is not None
        prompt = [next(iter(entry.values())).logprob for entry in output.prompt_logprobs if entry]
        given.append([*prompt, output.outputs[0].cumulative_logprob])
    return given


@pytest.mark.parametrize("name", FORMATS)
def test_through_the_engine(tmp_path: Path, name: str) -> None:
    """The quantized checkpoint gives what the dense one with the same numbers gives; with an ignored layer."""
    needs(name)
    form = FORMATS[name]
    ignored = {"compressed-tensors": "ignore", "fp8": "modules_to_not_convert", "awq": "modules_to_not_convert"}
    key = ignored.get(form.config["quant_method"])
    dense = ["layers.1.mlp"] if key else []
    quantized, plain = save_quantized(tmp_path, form, dense=dense)
    if key:
        patterns = ["re:.*layers.1.mlp.*"] if key == "ignore" else dense
        edit(quantized, **{key: ["lm_head", *patterns]})
    for ours, theirs in zip(logprobs(quantized), logprobs(plain), strict=True):
        if form.rounds_inputs:  # its greedy tokens may be others
            torch.testing.assert_close(torch.tensor(ours[:-1]), torch.tensor(theirs[:-1]), rtol=0, atol=0.3)
        else:
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-3)


ROTATED: dict[str, dict[str, Any]] = {
    "GlmForCausalLM": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "Phi3ForCausalLM": {
        "hidden_size": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.75},
    },
    # The matrix of keys and values is taken apart; each token goes through all experts, so that none is another's.
    "DeepseekV3ForCausalLM": {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_mtp_layers": 0},
}


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("AWQ", "GlmForCausalLM"),
        ("GPTQ, other order", "Phi3ForCausalLM"),
        ("int4, groups, zero points", "Phi3ForCausalLM"),
        ("fp8, blocks", "GlmForCausalLM"),
        ("fp8, blocks", "DeepseekV3ForCausalLM"),
        ("fp8, a scale a matrix, dynamic inputs", "Phi3ForCausalLM"),
    ],
)
def test_matrices_in_one_tensor_and_heads_in_another_order(tmp_path: Path, name: str, architecture: str) -> None:
    """Gate and up, or all, are joined in the checkpoint; a part of each head is rotated, of one in neighbours."""
    needs(name)
    form = FORMATS[name]
    config = ROTATED[architecture]
    quantized, plain = save_quantized(tmp_path, form, architecture=architecture, dense=["mlp.gate."], **config)
    for ours, theirs in zip(logprobs(quantized), logprobs(plain), strict=True):
        tolerance = 0.3 if form.rounds_inputs else 1e-3
        torch.testing.assert_close(torch.tensor(ours[:-1]), torch.tensor(theirs[:-1]), rtol=0, atol=tolerance)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    fields["quantization_config"].update(changes)
    file.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("AWQ", {"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes' is not supported"),
        ("AWQ", {"quant_method": None}, "quant_method=None is not supported"),
        ("AWQ", {"bits": 3}, "bits=3 is not supported"),
        ("AWQ", {"version": "gemv"}, "version='gemv' is not supported"),
        ("AWQ", {"a_field_of_next_year": 1}, "a_field_of_next_year=1 is not supported"),
        ("GPTQ, version 1", {"bits": 2}, "bits=2 is not supported"),
        ("GPTQ, version 1", {"dynamic": {"-:.*down.*": {}}}, "dynamic=.*is not supported"),
        ("GPTQ, version 1", {"checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not supported"),
        ("fp8, blocks", {"fmt": "e5m2"}, "fmt='e5m2' is not supported"),
    ],
)
def test_what_is_not_known_is_refused_by_name_before_the_weights(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    quantized, _ = save_quantized(tmp_path, FORMATS[name])
    edit(quantized, **changes)
    save_file({}, quantized / "model.safetensors")
    with pytest.raises(NotImplementedError, match=message):
        logprobs(quantized)


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}


@pytest.mark.parametrize(
    ("group", "others", "message"),
    [
        ({}, {"format": "mxfp4-pack-quantized"}, "format='mxfp4-pack-quantized'"),
        ({}, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config="),
        ({}, {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme="),
        ({"output_activations": {"num_bits": 8}}, {}, "output_activations="),
        ({"input_activations": {"num_bits": 4, "strategy": "token"}}, {}, "num_bits=4"),
        ({"weights": {**INT4, "num_bits": 3}}, {}, "num_bits=3"),
        ({"weights": {**INT4, "type": "float"}}, {}, "4-bit floats"),
        ({}, {"format": "int-quantized"}, "4-bit integers"),
    ],
)
def test_schemes_of_compressed_tensors_that_are_not_known(
    group: dict[str, Any], others: dict[str, Any], message: str
) -> None:
    whole = {"targets": ["Linear"], "weights": INT4, "input_activations": None, **group}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": whole}, **others}
    with pytest.raises(NotImplementedError, match=message):
        read_scheme(config)


def test_layers_of_one_product_that_are_quantized_in_different_ways(tmp_path: Path) -> None:
    """Keys stay dense; with biases."""
    quantized, plain = save_quantized(tmp_path, FORMATS["AWQ"], dense=["k_proj"], architecture="Qwen2ForCausalLM")
    edit(quantized, modules_to_not_convert=["k_proj"])
    for ours, theirs in zip(logprobs(quantized), logprobs(plain), strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-3)


def test_a_tensor_of_another_kind_is_named(tmp_path: Path) -> None:
    """Dense weights where the config says FP8, and the other way round."""
    quantized, _ = save_quantized(tmp_path, FORMATS["fp8, blocks"])
    tensors = load_file(quantized / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    save_file({**tensors, name: tensors[name].float()}, quantized / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(f"'{name}' has dtype float32")):
        logprobs(quantized)
    edit(quantized, modules_to_not_convert=["o_proj"])
    with pytest.raises(ValueError, match=r"o_proj\.weight' has dtype float8_e4m3fn .* lets it have float32 or"):
        logprobs(quantized)


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    quantized, plain = save_quantized(tmp_path, FORMATS["AWQ"])
    with pytest.raises(ValueError, match=r"quantization='int4' is for checkpoints that are not quantized.*'awq'"):
        logprobs(quantized, quantization="int4")
    with pytest.raises(ValueError, match="deterministic=True does not cover quantized checkpoints"):
        logprobs(quantized, deterministic=True)
    with pytest.raises(ValueError, match="deterministic=True does not cover quantization='int8'"):
        logprobs(plain, quantization="int8", deterministic=True)


def test_modelopts_file_beside_the_config_says_the_same(tmp_path: Path) -> None:
    quantized, _ = save_quantized(tmp_path, FORMATS["FP8, ModelOpt"])
    want = logprobs(quantized)
    fields = json.loads((quantized / "config.json").read_text())
    stated = fields.pop("quantization_config")
    (quantized / "config.json").write_text(json.dumps(fields))
    beside = quantized / "hf_quant_config.json"
    said = {name: stated[name] for name in ("quant_algo", "exclude_modules")} | {"kv_cache_quant_algo": None}
    beside.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": said}))
    assert logprobs(quantized) == want
    beside.write_text(json.dumps({"quantization": {**said, "quant_algo": "W4A8_AWQ"}}))
    with pytest.raises(NotImplementedError, match="quant_algo='W4A8_AWQ' is not supported"):
        logprobs(quantized)
    beside.write_text(json.dumps({"quantization": "FP8"}))
    with pytest.raises(ValueError, match=r"hf_quant_config.json: quantization must be an object, got 'FP8'"):
        logprobs(quantized)


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4"])
def test_scales_of_a_cache_in_modelopts_checkpoints_are_read_and_left(algorithm: str) -> None:
    config = {"quant_method": "modelopt", "quant_algo": algorithm, "exclude_modules": ["lm_head", "model.layers.1*"]}
    names = tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    spec = LinearSpec((16, 16, 16), (range(16),) * 3, 32, range(32), torch.float32, names)
    for more, expected in (({}, [[], [], []]), ({"kv_cache_quant_algo": "FP8"}, [[], ["k_scale"], ["v_scale"]])):
        scheme = read_scheme({**config, **more})
        assert scheme.method_of("model.layers.1.self_attn.q_proj") is None
        method = scheme.method_of(names[0])
        assert method is not None
        layer = method(spec)
        given = [[name for name, _ in layer.weights(part) if name in ("k_scale", "v_scale")] for part in range(3)]
        assert given == expected
    with pytest.raises(NotImplementedError, match="quant_algo='W4A8_AWQ' is not supported"):
        read_scheme({**config, "quant_algo": "W4A8_AWQ"})


EXPERTS = [
    "int4, groups, zero points",
    "int8, packed, zero points",
    "fp8, blocks",
    "AWQ",
    "fp8, a scale a row, dynamic inputs",
]


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(tmp_path: Path, name: str) -> None:
    """Of a mixture, each with matrices of its own; the router stays dense."""
    needs(name)
    form = FORMATS[name]
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64}
    quantized, plain = save_quantized(tmp_path, form, dense=["mlp.gate."], architecture="Qwen3MoeForCausalLM", **sizes)
    key = "ignore" if form.config["quant_method"] == "compressed-tensors" else "modules_to_not_convert"
    edit(quantized, **{key: ["lm_head", "re:.*mlp.gate$"] if key == "ignore" else ["lm_head", "mlp.gate"]})
    for ours, theirs in zip(logprobs(quantized), logprobs(plain), strict=True):
        if form.rounds_inputs:
            torch.testing.assert_close(torch.tensor(ours[:-1]), torch.tensor(theirs[:-1]), atol=1.0, rtol=0)
        else:
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-3, rtol=0)


def test_experts_in_different_forms_are_refused(tmp_path: Path) -> None:
    needs("int4, groups")
    quantized, _ = save_quantized(
        tmp_path, FORMATS["int4, groups"], dense=["mlp.gate.", "experts.1."], architecture="Qwen3MoeForCausalLM",
        **{"hidden_size": 64, "moe_intermediate_size": 64},
    )  # fmt: skip
    edit(quantized, ignore=["lm_head", "re:.*mlp.gate$", "re:.*experts.1.*"])
    with pytest.raises(NotImplementedError, match=r"mlp\.experts: experts in different forms"):
        logprobs(quantized)
