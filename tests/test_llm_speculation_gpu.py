"""Drafts that are made and verified in captured steps change no bit of what an engine says. Run: pytest -m gpu"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from tests.gpu_engine import make_llm
from tests.tiny_models import random_prompts

pytestmark = pytest.mark.gpu

VOCAB = 24  # few tokens, so that random weights guess some of them rightly
LAYER = {
    **{"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 64, "rms_norm_eps": 1e-6, "vocab_size": VOCAB, "max_position_embeddings": 512, "rope_theta": 1e4},
    **{"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False},
}
PROMPTS = random_prompts([5, 70, 1, 40, 64, 9, 130, 33, 12, 3, 65, 20], vocab_size=VOCAB)
PARAMS = [
    SamplingParams(
        **{"temperature": [0.0, 1.0, 0.7][i % 3], "seed": i, "max_tokens": 24 + i, "ignore_eos": True},
        **[{}, {"top_p": 0.9}, {"presence_penalty": 0.5, "logprobs": 1}][i % 3 if i > 8 else 0],
    )
    for i in range(len(PROMPTS))
]
HEADS: dict[str, dict[str, Any]] = {
    "eagle3": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "draft_vocab_size": VOCAB},
    "dflash": {"aux_hidden_state_layer_ids": [0, 1, 2], "mask_token_id": 0, "block_size": 5, "draft_vocab_size": VOCAB},
}


def save(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


TARGETS: dict[str, dict[str, Any]] = {
    "attention": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 3},
    "delta nets": {
        **{"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "num_hidden_layers": 3},
        **{"layer_types": ["linear_attention", "full_attention", "linear_attention"], "mtp_num_hidden_layers": 1},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64},
        **{"linear_value_head_dim": 64, "partial_rotary_factor": 0.5},
    },
    "convolutions": {
        **{"architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "num_hidden_layers": 3, "norm_eps": 1e-6},
        **{"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3, "conv_bias": False},
        "block_auto_adjust_ff_dim": False,
    },
}
METHODS = {
    "attention": ["draft_model", "eagle3", "dflash", "ngram"],
    "delta nets": ["mtp", "eagle3", "ngram"],
    "convolutions": ["ngram"],
}


@pytest.fixture(scope="module", params=TARGETS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, kind: str) -> str:
    config = {**LAYER, **TARGETS[kind]}
    if kind == "convolutions":
        del config["rms_norm_eps"], config["attention_bias"], config["hidden_act"], config["head_dim"]
    return save(tmp_path_factory.mktemp("models") / "target", config)


def engine(folder: str, **options: Any) -> LLM:
    """Places for five times as many rows as there are prompts: with fewer, a target with states would hardly draft."""
    return make_llm(Path(folder), load_format="dummy", deterministic=True, max_num_seqs=5 * len(PROMPTS), **options)


@pytest.fixture(scope="module")
def expected(folder: str) -> Iterator[list[list[int]]]:
    with engine(folder) as llm:
        yield tokens(llm, PARAMS)


def tokens(llm: LLM, params: list[SamplingParams]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]


def drafting(method: str, folder: str, tmp_path: Path) -> dict[str, Any]:
    fields: dict[str, Any] = {"method": method, "num_speculative_tokens": 4, "adaptive": False}
    if method == "draft_model":
        fields["model"] = folder  # the target itself, so that it is right where nothing is drawn by chance
    elif method == "ngram":
        fields["prompt_lookup_min"] = 1
    elif method in HEADS:
        kind, num_layers = {"eagle3": ("llama", 1), "dflash": ("qwen3", 2)}[method]
        layer = {**LAYER, "model_type": kind, "num_hidden_layers": num_layers}
        config = {"speculators_model_type": method, "transformer_layer_config": layer, **HEADS[method]}
        fields["model"] = save(tmp_path / "head", config)
    return {"speculative_config": fields}


WAYS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "synchronous": {"overlap_depth": 1},
    "deep": {"overlap_depth": 3},
    "eager": {"enforce_eager": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["draft_model", "eagle3", "dflash", "mtp", "ngram"])
def test_every_token_is_the_same(
    folder: str, kind: str, expected: list[list[int]], tmp_path: Path, method: str, way: str
) -> None:
    """First rows that are drawn from their logits as they are, so in chained steps; then all, some edited."""
    if method not in METHODS[kind]:
        pytest.skip("not for this target")
    with engine(folder, **drafting(method, folder, tmp_path), **WAYS[way]) as llm:
        plain = [p if p.logprobs is None else SamplingParams(max_tokens=1) for p in PARAMS]
        assert [t for t, p in zip(tokens(llm, plain), PARAMS, strict=True) if p.logprobs is None] == [
            t for t, p in zip(expected, PARAMS, strict=True) if p.logprobs is None
        ]
        assert tokens(llm, PARAMS) == expected
        metrics = llm.get_metrics()
    drafted, accepted = (metrics[f"spec_decode_num_{name}_tokens"] for name in ("draft", "accepted"))
    assert drafted > 100 and accepted > (60 if method == "draft_model" else 3)
