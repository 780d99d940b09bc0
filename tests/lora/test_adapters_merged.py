"""An adapter computes what the model with merged weights does, for each kind of layer, family, rank and scale."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.lora.request import LoRARequest
from tests.lora.random_adapters import EVERYTHING, logprobs_of, make_tensors, merged, request, save
from tests.tiny_models import load_hugging_face, random_prompts, save_random

PROMPTS = random_prompts([20, 5, 33])
SCORED = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)


def make_llm(folder: Path, **options: Any) -> LLM:
    defaults = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "block_size": 8}
    return LLM(str(folder), enable_lora=True, max_num_seqs=16, **{**defaults, **options})


def prompt_logprobs(llm: LLM, prompts: list[list[int]], adapters: Any) -> list[Tensor]:
    outputs = llm.generate(prompts, SCORED, use_tqdm=False, lora_request=adapters)
    return [
        torch.tensor([entry[token].logprob for entry, token in zip(o.prompt_logprobs[1:], p[1:], strict=True)])
        for o, p in zip(outputs, prompts, strict=True)
    ]


def check_equal(llm: LLM, adapter: Any, hf: Any) -> None:
    """Beside base rows, which are checked by who has more than one adapter."""
    got = prompt_logprobs(llm, PROMPTS * 2, [adapter] * len(PROMPTS) + [None] * len(PROMPTS))
    for prompt, logprobs in zip(PROMPTS, got[: len(PROMPTS)], strict=True):
        torch.testing.assert_close(logprobs, logprobs_of(hf, prompt), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("model"), "Qwen2ForCausalLM")  # QKV has biases


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with make_llm(folder, max_loras=2, max_lora_rank=20, max_cpu_loras=100) as llm:
        yield llm


@pytest.mark.parametrize("rank", [1, 4, 20])
@pytest.mark.parametrize("module", [*EVERYTHING.split("|")[1:], *"qkvo", "gate", "up", "down"])
def test_each_module_and_rank(folder: Path, llm: LLM, module: str, rank: int) -> None:
    pattern = module if "_" in module else f"{module}_proj"
    tensors = make_tensors(load_hugging_face(folder), pattern, rank, seed=rank)
    check_equal(llm, request("one", tensors, rank, 2 * rank), merged(folder, tensors, 2.0))


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("Phi3ForCausalLM", {}),  # its checkpoints hold QKV as one, and gate and up
        ("Glm4ForCausalLM", {}),  # heads are kept in another order; gate and up are one
        ("Gemma2ForCausalLM", {"head_dim": 16}),  # scaled embeddings, a tied head
        ("Starcoder2ForCausalLM", {"use_bias": True}),  # no gate, biases everywhere
        ("Olmo2ForCausalLM", {}),
        ("Qwen2MoeForCausalLM", {}),  # all but its experts, the shared one and its gate among them
        ("GraniteMoeHybridForCausalLM", {}),  # gate and up by another name
        ("Lfm2ForCausalLM", {}),
    ],
)
def test_families(tmp_path: Path, architecture: str, config: dict[str, Any]) -> None:
    folder = save_random(tmp_path, architecture, **config)
    tensors = make_tensors(load_hugging_face(folder), ".*", biases=True)
    with make_llm(folder) as llm:
        check_equal(llm, request("one", tensors), merged(folder, tensors, 2.0))


def test_patterns_of_rank_and_alpha_and_rslora(folder: Path, llm: LLM, tmp_path: Path) -> None:
    """The first pattern that matches the end of a name counts; rank and alpha of rsLoRA are what the patterns say."""
    hf = load_hugging_face(folder)
    of_q = make_tensors(hf, "q_proj", rank=9, seed=1)
    of_v = make_tensors(hf, "v_proj", rank=4, seed=2)
    config = {
        "rank_pattern": {"q_proj": 9, "layers.1.self_attn.q_proj": 5},
        "alpha_pattern": {r"layers\.\d+\.self_attn\.v_proj": 6},
        "use_rslora": True,
    }
    path = save(tmp_path / "patterns", of_q | of_v, 4, 8, **config)
    # 8 / sqrt(9) and 6 / sqrt(4), so that the factor is in B for one reference of both
    scaled = {n: t * (8 / 3) if "B.weight" in n else t for n, t in of_q.items()}
    scaled |= {n: t * (6 / 2) if "B.weight" in n else t for n, t in of_v.items()}
    check_equal(llm, LoRARequest("patterns", 7, str(path)), merged(folder, scaled, 1.0))


def test_deterministic(folder: Path) -> None:
    """To the bit the same alone and among others; and still what merged weights give."""
    tensors = [make_tensors(load_hugging_face(folder), seed=seed) for seed in range(2)]
    adapters = [request(f"a{seed}", each) for seed, each in enumerate(tensors)]
    with make_llm(folder, deterministic=True, max_loras=2) as llm:
        check_equal(llm, adapters[0], merged(folder, tensors[0], 2.0))
        together = prompt_logprobs(llm, PROMPTS, [adapters[0], adapters[1], None])
        for prompt, adapter, want in zip(PROMPTS, [*adapters, None], together, strict=True):
            assert torch.equal(prompt_logprobs(llm, [prompt], [adapter])[0], want)


@pytest.mark.parametrize("quantization", ["int8"])
def test_over_quantized_weights(folder: Path, quantization: str) -> None:
    """The change that an adapter makes is that of the dense model, as far as rounding lets one see it."""
    tensors = make_tensors(load_hugging_face(folder), "q_proj|down_proj")
    want = [logprobs_of(merged(folder, tensors, 2.0), prompt) for prompt in PROMPTS]
    with make_llm(folder, quantization=quantization) as llm:
        got = prompt_logprobs(llm, PROMPTS, request("one", tensors))
        base = prompt_logprobs(llm, PROMPTS, None)
    for one, other, without in zip(got, want, base, strict=True):
        assert (one - other).norm() < 0.2 * (without - other).norm()
