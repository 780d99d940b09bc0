"""`quantization=`: dense checkpoints whose layers are quantized while they are loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.kernels import quantized_linear
from nanovllm.kernels.quantized_linear import dequantize, quantize_rows, round_rows
from nanovllm.layers.linear_method import LinearSpec
from nanovllm.quantization.online import Online
from nanovllm.quantization.quantized_linear import QuantizedLinear
from tests.tiny_models import save_random

# Largest difference from the dense matrix, as a share of its largest number: half a step of the codes.
STEP = {"fp8": 16 / 448, "int8": 0.5 / 127, "int8_dynamic": 0.5 / 127, "int4": 1.01 / 15}


def layer_of(kind: str, weights: list[Tensor], inputs: range | None = None) -> QuantizedLinear:
    sizes = tuple(len(weight) for weight in weights)
    in_features = weights[0].shape[1]
    held = range(in_features) if inputs is None else inputs
    layer = Online(kind)(LinearSpec(sizes, tuple(map(range, sizes)), in_features, held, torch.float32, ("a", "b")))
    for part, weight in enumerate(weights):
        ((name, spec),) = layer.weights(part)
        assert name == "weight" and spec.shape == weight.shape
        spec.fill(weight)
    layer.finish()
    return layer


@pytest.mark.parametrize("kind", STEP)
def test_each_number_is_rounded_to_the_nearest(kind: str) -> None:
    weights = [torch.randn(6, 64), 100 * torch.randn(10, 64)]
    weights[0][2] = 0
    kept = dequantize(layer_of(kind, weights).weight, torch.float32)
    for row, weight in zip(kept, torch.cat(weights), strict=True):
        assert (row - weight).abs().max() <= STEP[kind] * (weight.max() - weight.min()) + 1e-12


@pytest.mark.parametrize("kind", STEP)
def test_ranks_hold_what_one_would(kind: str) -> None:
    weight = torch.randn(6, 256)
    whole = dequantize(layer_of(kind, [weight]).weight, torch.float32)
    halves = range(128), range(128, 256)
    parts = [dequantize(layer_of(kind, [weight], half).weight, torch.float32) for half in halves]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("group_size", [None, 16, 24])
def test_inputs_are_rounded_row_by_row(kind: str, group_size: int | None) -> None:
    """Also where the last group is shorter; a row of zeros stays one, and nothing is beyond the largest code."""
    x = torch.randn(7, 64) * torch.logspace(-3, 3, 7)[:, None]
    x[3] = 0
    rounded = round_rows(x, kind, group_size)
    assert (rounded - x).abs().max() <= STEP[kind] * x.abs().max() and not rounded[3].any()
    alone = torch.cat([round_rows(row[None], kind, group_size) for row in x])
    assert torch.equal(alone, rounded), "a row depends on itself alone"
    codes, _ = quantize_rows(x, kind, scale=torch.tensor(1e-6))
    assert codes.float().isfinite().all(), "what is beyond the largest code becomes it"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_numbers_on_a_cpu(dtype: torch.dtype) -> None:
    """Exact sums of codes: as the rounded inputs times the matrix, whatever the number of rows."""
    layer, x = layer_of("int8_dynamic", [torch.randn(24, 64)]), torch.randn(9, 64).to(dtype)
    bias = torch.randn(24).to(dtype)
    want = round_rows(x.float(), "int8") @ dequantize(layer.weight, torch.float32).t() + bias.float()
    got = layer.multiply(x, bias)
    torch.testing.assert_close(got.float(), want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-2)
    assert torch.equal(torch.cat([layer.multiply(row[None], bias) for row in x]), got)


def test_whole_products_are_exact_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Largest codes, and more of them than one float32 sums exactly."""
    x, codes = torch.full((3, 3000), 127, dtype=torch.int8), torch.full((5, 3000), -127, dtype=torch.int8)
    x[1], codes[2] = torch.randint(-127, 128, (2, 3000), dtype=torch.int8)
    want = (x.double() @ codes.double().t()).int()
    for has_exact in (quantized_linear._multiplies_int8(), False):
        monkeypatch.setattr(quantized_linear, "_multiplies_int8", lambda has_exact=has_exact: has_exact)
        assert torch.equal(quantized_linear._whole_product(x, codes), want)


def logprobs(folder: Path, **options: Any) -> list[float]:
    with LLM(str(folder), device="cpu", dtype="float32", skip_tokenizer_init=True, **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        (output,) = llm.generate([[1, 2, 3, 4, 5, 6, 7, 8]], params, use_tqdm=False)
    assert output.prompt_logprobs is not None
    return [next(iter(entry.values())).logprob for entry in output.prompt_logprobs if entry]


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Phi3ForCausalLM"])
@pytest.mark.parametrize(("kind", "tolerance"), [("fp8", 0.4), ("int8", 0.15), ("int8_dynamic", 0.2), ("int4", 2.0)])
def test_through_the_engine(tmp_path: Path, kind: str, tolerance: float, architecture: str) -> None:
    """Near the dense model, and not it; Phi-3's checkpoints hold queries, keys and values in one tensor."""
    folder = save_random(tmp_path, architecture, intermediate_size=64)
    dense, quantized = logprobs(folder), logprobs(folder, quantization=kind)
    assert dense != quantized
    torch.testing.assert_close(torch.tensor(quantized), torch.tensor(dense), rtol=0, atol=tolerance)
    assert logprobs(folder, quantization=kind, load_format="dummy")


def test_inputs_that_are_no_groups(tmp_path: Path) -> None:
    folder = save_random(tmp_path, intermediate_size=44)
    with pytest.raises(ValueError, match=r"mlp.down_proj: 44 inputs are no multiple of 32, which 'int4' needs"):
        logprobs(folder, quantization="int4")
    with pytest.raises(
        ValueError, match=r"quantization must be one of None, fp8, int8, int8_dynamic, int4, gguf, got 'int3'"
    ):
        logprobs(folder, quantization="int3")


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_experts(tmp_path: Path, load_format: str) -> None:
    """Of a mixture, in as few bytes as said; what chooses among them stays dense."""
    folder = save_random(tmp_path, "MixtralForCausalLM", hidden_size=64, intermediate_size=64)
    options = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "load_format": load_format}
    params, given = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0, ignore_eos=True), []
    for quantization in (None, "int8"):
        with LLM(str(folder), quantization=quantization, **options) as llm:
            assert llm.quantization == quantization
            (output,) = llm.generate([[1, 2, 3, 4, 5, 6, 7]], params, use_tqdm=False)
            kinds = llm.apply_model(lambda model: {p.dtype for p in model.layers[0].mlp.router.parameters()})
        assert kinds == [{torch.float32}]
        assert output.prompt_logprobs is not None and len(output.outputs[0].token_ids) == 4
        given.append([next(iter(entry.values())).logprob for entry in output.prompt_logprobs if entry])
    if load_format == "auto":
        differences = (torch.tensor(given[0]) - torch.tensor(given[1])).abs()
        assert 0 < differences.median() < 0.2  # a token that then goes to another expert may differ by more
